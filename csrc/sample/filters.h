// The temperature and the filters of a row, in one source for the CPU and for CUDA.
#pragma once

#include "sample/params.h"
#ifdef __CUDACC__
#include "common/device.h"
#else
#include "common/simd.h"
#endif

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

  DFLASH_MEMBER Filters(const FilterParams& p, int64_t row)
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

DFLASH_INLINE int64_t bits_of(double x) { return __builtin_bit_cast(int64_t, x); }
DFLASH_INLINE int32_t bits_of(float x) { return __builtin_bit_cast(int32_t, x); }

// Returns the largest number below x; -inf and NaN stay.
template <class Real>
DFLASH_INLINE Real next_below(Real x) {
  if (!(x > -kInfinity)) return x;
  if (x == 0) return -__builtin_bit_cast(Real, bits_of(Real(0)) + 1);
  return __builtin_bit_cast(Real, bits_of(x) + (x > 0 ? -1 : 1));
}

// Returns the smallest x for which x / temperature, as the division rounds it, is at least the pivot. Tokens that the
// division makes equal are therefore all kept or all dropped.
constexpr int kRoundingSteps = 4;  // more than the rounding of the product and the quotient
template <class Real>
DFLASH_INLINE Real smallest_logit(Real pivot, Real temperature) {
  if (temperature == 1) return pivot;
  Real x = pivot * temperature;
  for (int step = 0; step < kRoundingSteps; ++step) x = next_below(x);
  for (int step = 0; step < 2 * kRoundingSteps && x / temperature < pivot; ++step) x = -next_below(-x);
  return x;
}

}  // namespace dflash::DFLASH_ISA
