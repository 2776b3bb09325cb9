// A row of logits in memory, the parameters of its filters, and masses (unnormalised probabilities of its tokens).
#pragma once

#include "common/simd.h"
#include "sample/params.h"

namespace dflash::DFLASH_ISA {

template <class Real>
DFLASH_INLINE Real value_of(const PerRow& parameter, int64_t row) {
  return parameter.values ? static_cast<const Real*>(parameter.values)[row] : Real(parameter.value);
}

// The temperature and filters of one row. Values in tensors are not checked, so every value has a meaning here, by the
// rules of `filter_logits` in dflash_ext/reference/sampling.py. NaN fails every comparison.
template <class Real>
struct Filters {
  Real temperature, top_k, top_p, min_p;

  Filters(const FilterParams& p, int64_t row)
      : temperature(value_of<Real>(p.temperature, row)), top_k(value_of<Real>(p.top_k, row)),
        top_p(value_of<Real>(p.top_p, row)), min_p(value_of<Real>(p.min_p, row)) {
    constexpr Real kColdest = 1e-30, kHottest = 1e30;  // outside, 1 / temperature is no float32
    if (!(temperature >= kColdest)) temperature = 0;
    if (temperature > kHottest) temperature = kHottest;
    top_k = top_k >= 1 ? Real(__builtin_floor(top_k)) : 0;
    if (!(top_p < 1)) top_p = 1;
    min_p = min_p > 0 ? (min_p < 1 ? min_p : 1) : 0;
  }
};

template <class T, class Real>
struct Logits {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  using Wide = Vector<Real, kLanes>;

  const T* x;
  int64_t vocab;

  // Returns the logits of tokens [i, i + kLanes); past the end they are -inf.
  DFLASH_MEMBER Wide at(int64_t i) const {
    if (i + kLanes <= vocab) return load<Wide>(x + i);
    Wide v = Wide{} - kInfinity;
    for (int lane = 0; i + lane < vocab; ++lane) v[lane] = (*this)[i + lane];
    return v;
  }
  DFLASH_MEMBER Real operator[](int64_t token) const { return load<Vector<Real, 1>>(x + token)[0]; }
};

// Masses: exp((x - origin) / temperature) * scale for tokens whose logit x is at least `lowest`, 0 for the others.
template <class T, class Real>
struct Masses {
  using Wide = typename Logits<T, Real>::Wide;

  Logits<T, Real> logits;
  Real lowest, origin, inverse_temperature, scale;

  DFLASH_MEMBER Wide at(int64_t i) const {
    const Wide x = logits.at(i);
    return x >= lowest ? exp_of((x - origin) * inverse_temperature) * scale : Wide{};
  }
  DFLASH_MEMBER Real operator[](int64_t token) const {
    const Real x = logits[token];
    return x >= lowest ? exp_of((x - origin) * inverse_temperature) * scale : Real(0);
  }
};

DFLASH_INLINE int64_t bits_of(double x) { return bits_as<int64_t>(x); }
DFLASH_INLINE int32_t bits_of(float x) { return bits_as<int32_t>(x); }

// Returns the largest number below x; -inf and NaN stay.
template <class Real>
DFLASH_INLINE Real next_below(Real x) {
  if (!(x > -kInfinity)) return x;
  if (x == 0) return -bits_as<Real>(bits_of(Real(0)) + 1);
  return bits_as<Real>(bits_of(x) + (x > 0 ? -1 : 1));
}

// Returns the smallest x for which x / temperature, as the division rounds it, is at least the pivot. Tokens that the
// division makes equal are therefore all kept or all dropped.
template <class Real>
DFLASH_INLINE Real smallest_logit(Real pivot, Real temperature) {
  constexpr int kSteps = 4;  // more than the rounding of the product and the quotient
  Real x = pivot * temperature;
  for (int step = 0; step < kSteps; ++step) x = next_below(x);
  for (int step = 0; step < 2 * kSteps && x / temperature < pivot; ++step) x = -next_below(-x);
  return x;
}

}  // namespace dflash::DFLASH_ISA
