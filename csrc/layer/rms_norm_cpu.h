// The RMS norm of a row on the CPU.
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

template <class Real, class T, class Weight, class Out>
DFLASH_INLINE void normalise(Out* out, const T* x, const Weight* weight, int64_t count, double eps, bool plus_one) {
  const Real scale = norm_scale<Real>(x, count, eps), one = plus_one ? 1 : 0;
  for_each_lanes<Real>(count, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
    using X = decltype(lanes);
    store(out + i, load<X>(x + i) * scale * (load<X>(weight + i) + one));
  });
}

// The gradients of a norm: grad_x = grad_total, or 0, + that of x, and grad_weight is added to.
template <class Real, class T, class Weight, class Grad>
DFLASH_INLINE void normalise_backward(T* grad_x, Real* grad_weight, const T* grad_total, const Grad* grad, const T* x,
                                      const Weight* weight, int64_t count, double eps) {
  const Real scale = norm_scale<Real>(x, count, eps);
  Real products = 0;
  for_each_lanes<Real>(count, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
    using X = decltype(lanes);
    products += sum_lanes(load<X>(weight + i) * load<X>(grad + i) * load<X>(x + i));
  });
  const Real slope = scale * scale * products / count;
  for_each_lanes<Real>(count, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
    using X = decltype(lanes);
    const X own = load<X>(grad + i), at = load<X>(x + i);
    const X total = grad_total ? load<X>(grad_total + i) : X{};
    store(grad_x + i, total + (load<X>(weight + i) * own - at * slope) * scale);
    store(grad_weight + i, load<X>(grad_weight + i) + own * at * scale);
  });
}

}  // namespace dflash::DFLASH_ISA
