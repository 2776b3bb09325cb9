// Online softmax over an accumulator of mma.sync or wgmma (common/mma.h). The four lanes of a row hold it together.
#pragma once

#include "attn/masking.h"
#include "attn/scores.h"

namespace dflash::DFLASH_ISA {

// A row's sum over all columns, given the sums of its four lanes.
DFLASH_INLINE float total_of(float sum) {
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// The factor that normalises a row's output; it is zero for a row that sees no key.
DFLASH_INLINE float inverse_of(float total) { return total == 0 ? 0.0f : __fdividef(1, total); }

// The state of the thread's two rows.
struct OnlineSoftmax {
  float largest[2] = {-kInfinity, -kInfinity};  // of the scores so far, before `factor`
  float sum[2] = {0, 0};                        // of the exponentials in the thread's own columns

  // Adds the scores s, which become exp2(s * factor - the maximum). The rows' earlier sums and outputs must be
  // multiplied by `correction`.
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

  // After the last keys: returns the rows' normalisation factors and their natural-log LSEs.
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
