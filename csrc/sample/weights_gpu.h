// The weights of expected embeddings on a GPU: how far they may exceed 1, and how they are stored.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// How far, in units of log2, weights may exceed 1 before the origin is raised. It lets the first logits of a row choose
// the origin, so that the row is read once.
template <class Weight>
constexpr float kHeadroom = 64;
template <>
inline constexpr float kHeadroom<__half> = 0;  // whose range is small: all logits of the chunk choose it

// Rounds and stores neighbours, and returns the sum of what was stored.
template <int kCount>
DFLASH_INLINE float store_rounded(float* p, const float (&w)[kCount]) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; k += 4) {
    *reinterpret_cast<float4*>(p + k) = {w[k], w[k + 1], w[k + 2], w[k + 3]};
    sum += (w[k] + w[k + 1]) + (w[k + 2] + w[k + 3]);
  }
  return sum;
}
template <int kCount, class Weight>
DFLASH_INLINE float store_rounded(Weight* p, const float (&w)[kCount]) {
  uint32_t words[kCount / 2];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kCount / 2; ++k) {
    words[k] = pack<Weight>(w[2 * k], w[2 * k + 1]);
    float low, high;
    unpack<Weight>(low, high, words[k]);
    sum += low + high;
  }
  if constexpr (kCount == 8) {
    *reinterpret_cast<uint4*>(p) = {words[0], words[1], words[2], words[3]};
  } else {
    *reinterpret_cast<uint2*>(p) = {words[0], words[1]};
  }
  return sum;
}

}  // namespace dflash::DFLASH_ISA
