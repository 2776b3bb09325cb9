// The gradients of the RMS norm of a row on the CPU.
#pragma once

#include "common/rms_norm_cpu.h"

namespace dflash::DFLASH_ISA {

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
