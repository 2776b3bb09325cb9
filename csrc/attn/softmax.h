// Online softmax over the accumulators of matrix products, as mma.sync and wgmma lay them out: a thread holds columns
// 8j + 2t and 8j + 2t + 1 (t = lane % 4) of row lane / 4 in s[4j], s[4j + 1], and of the row 8 below in s[4j + 2],
// s[4j + 3]. The four lanes of a row hold it together.
#pragma once

#include "attn/params.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

DFLASH_INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What turns products of q and k into exponents of 2. Without softcap and with a positive scale that is one factor,
// which the exponential's own multiply-add takes in.
struct Scores {
  float factor, inner, outer;
  bool is_plain;

  DFLASH_INLINE explicit Scores(const AttentionParams& p) {
    // Compared as floats: comparisons of doubles wait for the tensor cores, with which they share an issue port.
    const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
    is_plain = cap == 0 && scale > 0;
    factor = is_plain ? scale * kLog2E : 1.0f;
    inner = cap == 0 ? scale * kLog2E : scale / cap * 2 * kLog2E;
    outer = cap * kLog2E;
  }

  // Leaves s such that s * factor is the exponent.
  template <int kCount>
  DFLASH_INLINE void operator()(float (&s)[kCount]) const {
    if (is_plain) return;
    if (outer == 0) {
#pragma unroll
      for (float& x : s) x *= inner;
    } else if (outer < kLargeCap) {
#pragma unroll
      for (float& x : s) x = capped(x);
    } else {
      // The first terms of tanh's series, where the difference of two large numbers would lose the score.
#pragma unroll
      for (float& x : s) {
        const float y = x * inner * (kLn2 / 2), square = y * y;
        x = square < 0.01f ? outer * y * (1 - square * (1.0f / 3 - square * (2.0f / 15))) : capped(x);
      }
    }
  }

 private:
  static constexpr float kLargeCap = 256;

  // tanh(x) = 1 - 2 / (exp(2x) + 1); a NaN stays one.
  DFLASH_INLINE float capped(float x) const {
    const float exponent = x * inner;
    return outer - __fdividef(2 * outer, exp2_of(exponent > 126 ? 126.0f : exponent) + 1);
  }
};

// ctx_lo, ctx_hi, blk_lo, blk_hi of a row.
DFLASH_INLINE int4 read_bounds(const Intervals& mask, int64_t batch, int64_t row) {
  const int64_t at = batch * mask.batch + row;
  return make_int4(mask.ctx_lo[at], mask.ctx_hi[at], mask.blk_lo[at], mask.blk_hi[at]);
}

// The keys that one row sees.
struct RowBounds {
  int ctx_lo = 0, blk_lo = 0;
  unsigned ctx_len = 0, blk_len = 0;

  RowBounds() = default;
  DFLASH_INLINE RowBounds(int4 bounds, int kv_len) : ctx_lo(max(bounds.x, 0)), blk_lo(max(bounds.z, 0)) {
    // Never a difference that overflows, whatever the bounds are.
    ctx_len = max(min(bounds.y, kv_len), ctx_lo) - ctx_lo;
    blk_len = max(min(bounds.w, kv_len), blk_lo) - blk_lo;
  }
  DFLASH_INLINE RowBounds(const Intervals& mask, int64_t batch, int64_t row, int kv_len)
      : RowBounds(read_bounds(mask, batch, row), kv_len) {}

  DFLASH_INLINE bool sees(int key) const {
    return static_cast<unsigned>(key - ctx_lo) < ctx_len || static_cast<unsigned>(key - blk_lo) < blk_len;
  }
};

// Hides what the thread's two rows do not see; column 0 is key `first`.
template <int kCount>
DFLASH_INLINE void hide(float (&s)[kCount], const RowBounds (&rows)[2], int first) {
  first += threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!rows[i / 2 % 2].sees(first + i / 4 * 8 + i % 2)) s[i] = -kInfinity;
  }
}

// A row's sum of all columns, given those of its four lanes.
DFLASH_INLINE float total_of(float sum) {
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// What a row's output is to be multiplied by, zero where it sees no key.
DFLASH_INLINE float inverse_of(float total) { return total == 0 ? 0.0f : __fdividef(1, total); }

struct OnlineSoftmax {
  float largest[2] = {-kInfinity, -kInfinity};  // of the scores so far, before `factor`
  float sum[2] = {0, 0};                        // of the thread's own columns

  // Takes in the scores s, which become exp2(s * factor - the maximum); `correction` is what the rows' earlier sums
  // are to be multiplied by.
  template <int kCount>
  DFLASH_INLINE void add(float (&s)[kCount], float factor, float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = largest[r];
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) m = fmaxf(m, fmaxf(s[i], s[i + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float base = m == -kInfinity ? 0.0f : __fmul_rn(m, factor);
      correction[r] = exp2_of(__fmul_rn(largest[r], factor) - base);
      largest[r] = m;
      float total = sum[r] * correction[r];
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) {
        s[i] = exp2_of(fmaf(s[i], factor, -base));
        s[i + 1] = exp2_of(fmaf(s[i + 1], factor, -base));
        total += s[i] + s[i + 1];
      }
      sum[r] = total;
    }
  }

  // Once all keys are in: what the rows' outputs are to be multiplied by, and their natural-log LSE.
  DFLASH_INLINE void finish(float factor, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = total_of(sum[r]);
      inverse[r] = inverse_of(sum[r]);
      lse[r] = sum[r] == 0 ? -kInfinity : (largest[r] * factor + __log2f(sum[r])) * kLn2;
    }
  }
};

}  // namespace dflash::DFLASH_ISA
