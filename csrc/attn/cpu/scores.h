// From products of q and k to scores, and from scores to exponentials.
#pragma once

#include "common/simd.h"

namespace dflash::DFLASH_ISA {

// e^x = 2^n (1 + e1) with |r| <= ln(2)/2 left over: returns 2^n and sets e1 = e^r - 1, by a polynomial that is minimax
// in the relative error of e^r (2e-9). x below -88 counts as -88, where 2^n is 0; x is at most 88.
template <class V>
DFLASH_INLINE V split_exp(V x, V& e1) {
  using U = Vector<uint32_t, lanes_of<V>>;
  // Adding and subtracting this number rounds to an integer. The low bits of the sum become the exponent of 2^n.
  constexpr float kRound = 0x1.8p23f + 127;
  x = x < -88.0f ? V{} - 88.0f : x;
  const V shifted = x * 0x1.715476p0f + kRound;
  const V n = shifted - kRound;
  const V r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  V poly = r * 0x1.6ab768p-10f + 0x1.126f2p-7f;
  poly = poly * r + 0x1.5558a4p-5f;
  poly = poly * r + 0x1.555406p-3f;
  poly = poly * r + 0x1.fffffap-2f;
  poly = poly * r + 1.0f;
  e1 = poly * r;
  return bits_as<V>(bits_as<U>(shifted) << 23);
}

// Returns e^x for x at most 88. It is 0 below -88, -inf included; NaN stays NaN.
template <int kLanes>
DFLASH_INLINE auto weight_lanes(Vector<float, kLanes> x) {
  Vector<float, kLanes> e1;
  const auto power = split_exp(x, e1);
  return power * (e1 + 1.0f);
}
template <int kLanes>
DFLASH_INLINE auto weight_lanes(Vector<double, kLanes> x) {
  return exp_of(x);
}
template <class V>
DFLASH_INLINE V weight_of(V x) {
  return weight_lanes<lanes_of<V>>(x);
}

// tanh x = (e^2x - 1) / (e^2x + 1), without cancellation near 0.
template <int kLanes>
DFLASH_INLINE auto tanh_lanes(Vector<float, kLanes> x) {
  using V = Vector<float, kLanes>;
  x = x > 20.0f ? V{} + 20.0f : x;
  V e1;
  const V power = split_exp(2 * x, e1);
  const V difference = power * e1 + (power - 1.0f);
  return difference / (difference + 2.0f);
}
template <int kLanes>
DFLASH_INLINE auto tanh_lanes(Vector<double, kLanes> x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// score = softcap(scale * product)
template <class Real>
struct Scoring {
  Real scale;
  Real cap;  // 0: none

  template <class V>
  DFLASH_MEMBER V operator()(V product) const {
    const V score = product * scale;
    return cap == 0 ? score : cap * tanh_lanes<lanes_of<V>>(score / cap);
  }
  // d(score) / d(scale * product)
  template <class V>
  DFLASH_MEMBER V slope(V score) const {
    return 1 - (score / cap) * (score / cap);
  }
};

// The origin of exponentials. It is 0 for rows that have seen no key yet.
template <class V>
DFLASH_INLINE V finite_or_zero(V max) {
  return max == -kInfinity ? V{} : max;
}

}  // namespace dflash::DFLASH_ISA
