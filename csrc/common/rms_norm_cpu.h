// The RMS norm on the CPU.
#pragma once

#include "common/simd.h"

namespace dflash::DFLASH_ISA {

// The factor by which an RMS norm multiplies `count` numbers.
template <class Real, class T>
DFLASH_INLINE Real norm_scale(const T* x, int64_t count, double eps) {
  constexpr int kLanes = kVectorBytes / sizeof(Real);
  using X = Vector<Real, kLanes>;
  X sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const X v = load<X>(x + i);
    sums += v * v;
  }
  Real squares = sum_lanes(sums);
  for (; i < count; ++i) {
    const Real v = load<Vector<Real, 1>>(x + i)[0];
    squares += v * v;
  }
  return Real(1 / __builtin_sqrt(squares / count + eps));
}

// out = the norm of x times `weight`, or times 1 + weight. Without a weight it is the norm alone. `out` may be `x`.
template <class Real, class T, class Weight, class Out>
DFLASH_INLINE void normalise(Out* out, const T* x, const Weight* weight, int64_t count, double eps, bool plus_one) {
  const Real scale = norm_scale<Real>(x, count, eps), one = plus_one ? 1 : 0;
  for_each_lanes<Real>(count, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
    using X = decltype(lanes);
    const X normed = load<X>(x + i) * scale;
    store(out + i, weight ? normed * (load<X>(weight + i) + one) : normed);
  });
}

}  // namespace dflash::DFLASH_ISA
