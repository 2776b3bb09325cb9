// Logits in memory and in registers on a GPU, what lanes do with them, and masses (unnormalised probabilities).
#pragma once

#include "sample/filters.h"

namespace dflash::DFLASH_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

DFLASH_INLINE int lane_id() { return threadIdx.x % 32; }
DFLASH_INLINE int warp_id() { return threadIdx.x / 32; }

// ex2.approx.ftz: 2^x. Results below the smallest normal number are 0.
DFLASH_INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// min.NaN: NaN if one of them is NaN.
DFLASH_INLINE float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

template <class Number>
DFLASH_INLINE Number warp_sum(Number x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

// Returns the sum over this lane and those before it.
template <class Number>
DFLASH_INLINE Number warp_scan(Number x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number before = __shfl_up_sync(~0u, x, step);
    if (lane_id() >= step) x += before;
  }
  return x;
}

// The two largest logits.
struct Best {
  float first, second;

  DFLASH_INLINE static Best none() { return {-kInfinity, -kInfinity}; }
  DFLASH_INLINE void merge(const Best& other) {
    second = fmaxf(fmaxf(second, other.second), fminf(first, other.first));
    first = fmaxf(first, other.first);
  }
  DFLASH_INLINE void merge_warp() {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) merge(shuffle_xor(*this, mask));
  }
  // NaN is neither.
  DFLASH_INLINE void add(float x) {
    second = fmaxf(min_nan(first, x), second);
    first = fmaxf(x, first);
  }
};

DFLASH_INLINE __nv_bfloat162 both(__nv_bfloat16 x) { return __bfloat162bfloat162(x); }
DFLASH_INLINE __half2 both(__half x) { return __half2half2(x); }

// The same of chunks, for types of 16 bits two at a time.
template <class T>
struct BestOfChunks {
  using Pair = decltype(both(T{}));
  Pair first = both(from_float<T>(-kInfinity)), second = first;

  DFLASH_INLINE void add(const Chunk<T>& chunk) {
    const Pair* pairs = reinterpret_cast<const Pair*>(chunk.values);
#pragma unroll
    for (int k = 0; k < Chunk<T>::kSize / 2; ++k) {
      second = __hmax2(__hmin2_nan(first, pairs[k]), second);
      first = __hmax2(pairs[k], first);
    }
  }
  DFLASH_INLINE Best best() const {
    Best best{to_float(first.x), to_float(second.x)};
    best.merge({to_float(first.y), to_float(second.y)});
    return best;
  }
};

template <>
struct BestOfChunks<float> {
  Best value = Best::none();

  DFLASH_INLINE void add(const Chunk<float>& chunk) {
#pragma unroll
    for (int k = 0; k < 4; ++k) value.add(chunk.values[k]);
  }
  DFLASH_INLINE Best best() const { return value; }
};

// Loads the logits of tokens [i, i + kSize); past the end they are -inf.
template <class T>
DFLASH_INLINE Chunk<T> load_chunk(const T* x, uint32_t vocab, uint32_t i, bool aligned) {
  constexpr int kSize = Chunk<T>::kSize;
  if (aligned && i + kSize <= vocab) return *reinterpret_cast<const Chunk<T>*>(x + i);
  Chunk<T> chunk;
#pragma unroll
  for (int k = 0; k < kSize; ++k) chunk.values[k] = i + k < vocab ? x[i + k] : from_float<T>(-kInfinity);
  return chunk;
}

// The distribution of a row: exp2((x - origin) * rate) * scale for logits x of at least `lowest`, 0 for the others.
template <class T>
struct Masses {
  static constexpr int kSize = Chunk<T>::kSize;
  float lowest, origin, rate, scale;

  // The exponent of a NaN, and of -inf - -inf, is that of -inf, whose mass is 0. 0 * -inf would be NaN.
  DFLASH_INLINE float exponent(float x) const { return fmaxf((x - origin) * rate, -1e4f); }
  DFLASH_INLINE float operator()(float x) const { return x >= lowest ? exp2_of(exponent(x)) * scale : 0.f; }
  DFLASH_INLINE void operator()(float (&mass)[kSize], const Chunk<T>& x) const {
#pragma unroll
    for (int k = 0; k < kSize; ++k) mass[k] = (*this)(to_float(x.values[k]));
  }
  // Any masses have this: what computes the masses of the chunks of a batch (row_gpu.h).
  template <class Batch>
  DFLASH_INLINE auto of(const Batch&) const {
    return [mass = *this](float(&own)[kSize], int, uint32_t, const Chunk<T>& x) { mass(own, x); };
  }
};

}  // namespace dflash::DFLASH_ISA
