// The activations of gated MLPs and their slopes, for one number or for vectors of them.
#pragma once

#include "layer/params.h"

namespace dflash::DFLASH_ISA {

// x * sigmoid(x), or GELU by tanh: x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
// X is Real or a vector of it.
template <class Real, class X>
DFLASH_INLINE X activated(Activation activation, X x) {
  constexpr Real kLinear = Real(1.59576912160573071176), kCubic = Real(1.59576912160573071176 * 0.044715), kOne = 1;
  const X u = activation == Activation::kSilu ? x : x * (x * x * kCubic + kLinear);
  return x / (exp_of(-u) + kOne);
}

// The same, and its derivative.
template <class Real, class X>
DFLASH_INLINE void activated_with_slope(Activation activation, X x, X& value, X& slope) {
  constexpr Real kLinear = Real(1.59576912160573071176), kCubic = Real(1.59576912160573071176 * 0.044715), kOne = 1;
  const bool is_silu = activation == Activation::kSilu;
  const X u = is_silu ? x : x * (x * x * kCubic + kLinear);
  const X sigmoid = kOne / (exp_of(-u) + kOne);
  const X inner = is_silu ? x : x * (x * x * (3 * kCubic) + kLinear);  // x * du/dx
  value = x * sigmoid;
  slope = sigmoid * (inner * (kOne - sigmoid) + kOne);
}

}  // namespace dflash::DFLASH_ISA
