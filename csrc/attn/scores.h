// From the products of q and k to the exponents of the softmax, on a GPU.
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

// Turns products of q and k into exponents of 2: the product times the scale, then the softcap. Without a softcap and
// with a positive scale this is one factor, which the multiply-add of the exponential applies at no cost.
struct Scores {
  float factor, inner, outer;
  bool is_plain;

  Scores() = default;
  DFLASH_INLINE explicit Scores(const AttentionParams& p) {
    // The comparisons are of floats, because those of doubles share an issue port with the tensor cores and wait for
    // them.
    const float scale = static_cast<float>(p.scale), cap = static_cast<float>(p.softcap);
    is_plain = cap == 0 && scale > 0;
    factor = is_plain ? scale * kLog2E : 1.0f;
    inner = cap == 0 ? scale * kLog2E : scale / cap * 2 * kLog2E;
    outer = cap * kLog2E;
  }

  // Changes s such that s * factor is the exponent.
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
      // Under a large cap, small scores use the first terms of tanh's series: the difference of two large numbers would
      // lose them.
#pragma unroll
      for (float& x : s) {
        const float y = x * inner * (kLn2 / 2), square = y * y;
        x = square < 0.01f ? outer * y * (1 - square * (1.0f / 3 - square * (2.0f / 15))) : capped(x);
      }
    }
  }

 private:
  static constexpr float kLargeCap = 256;

  // tanh(x) = 1 - 2 / (exp(2x) + 1); a NaN stays a NaN.
  DFLASH_INLINE float capped(float x) const {
    const float exponent = x * inner;
    return outer - __fdividef(2 * outer, exp2_of(exponent > 126 ? 126.0f : exponent) + 1);
  }
};

}  // namespace dflash::DFLASH_ISA
