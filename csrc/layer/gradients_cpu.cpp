// What a layer needs in training beside its decode kernels, on the CPU: gradients, and the rotation of heads.
#include "common/rope_cpu.h"
#include "common/simd.h"
#include "layer/activation.h"
#include "layer/params.h"
#include "layer/rms_norm_cpu.h"

namespace dflash::DFLASH_ISA {

// The kernel runs over the elements of the result.
void gated_backward(const GatedBackwardParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const T *gates = static_cast<const T*>(p.gate) + begin, *ups = static_cast<const T*>(p.up) + begin;
    T *grads = static_cast<T*>(p.grad) + begin, *others = static_cast<T*>(p.other) + begin;
    for_each_lanes<Real>(end - begin, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
      using X = decltype(lanes);
      const X grad = load<X>(grads + i), up = load<X>(ups + i);
      X value, slope;
      activated_with_slope<Real>(p.activation, load<X>(gates + i), value, slope);
      store(grads + i, grad * up * slope);
      store(others + i, grad * value);
    });
  });
}

// The kernel runs over parts.
void rms_norm_backward(const RmsNormBackwardParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    for (int64_t part = begin; part < end; ++part) {
      Real* grad_weight = static_cast<Real*>(p.grad_weight) + part * p.width;
      for (int64_t i = 0; i < p.width; ++i) grad_weight[i] = 0;
      for (int64_t row = part; row < p.rows; row += p.parts) {
        const int64_t start = row * p.width;
        normalise_backward<Real>(static_cast<T*>(p.grad_x) + start, grad_weight,
                                 p.grad_total ? static_cast<const T*>(p.grad_total) + start : nullptr,
                                 static_cast<const T*>(p.grad) + start, static_cast<const T*>(p.x) + start,
                                 static_cast<const T*>(p.weight), p.width, p.eps);
      }
    }
  });
}

// The kernel runs over the heads of all rows.
void rotate_heads(const RotateHeadsParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const Array<Real> head(p.head_dim);
    for (int64_t which = begin; which < end; ++which) {
      const int64_t start = which * p.head_dim, table = which / p.heads * p.table_stride;
      normalise<Real>(head.data(), static_cast<const T*>(p.x) + start, static_cast<const Real*>(p.weight), p.head_dim,
                      p.eps, false);
      rotate_halves(head.data(), static_cast<const Real*>(p.cos) + table, static_cast<const Real*>(p.sin) + table,
                    p.head_dim / 2);
      for_each_lanes<Real>(p.head_dim, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
        store(static_cast<T*>(p.out) + start + i, load<decltype(lanes)>(head.data() + i));
      });
    }
  });
}

// The kernel runs over parts.
void rotate_heads_backward(const RotateHeadsBackwardParams& b, int64_t begin, int64_t end) {
  const RotateHeadsParams& p = b.forward;
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const int64_t half = p.head_dim / 2;
    const Array<Real> head(p.head_dim);
    for (int64_t part = begin; part < end; ++part) {
      Real* grad_weight = static_cast<Real*>(b.grad_weight) + part * p.head_dim;
      for (int64_t i = 0; i < p.head_dim; ++i) grad_weight[i] = 0;
      for (int64_t which = part; which < p.rows * p.heads; which += b.parts) {
        const int64_t start = which * p.head_dim, table = which / p.heads * p.table_stride;
        const T* grad = static_cast<const T*>(b.grad) + start;
        for_each_lanes<Real>(half, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
          using X = decltype(lanes);
          const X cos = load<X>(static_cast<const Real*>(p.cos) + table + i);
          const X sin = load<X>(static_cast<const Real*>(p.sin) + table + i);
          const X first = load<X>(grad + i), second = load<X>(grad + half + i);
          store(head.data() + i, first * cos + second * sin);
          store(head.data() + half + i, second * cos - first * sin);
        });
        normalise_backward<Real>(static_cast<T*>(b.grad_x) + start, grad_weight, static_cast<const T*>(nullptr),
                                 head.data(), static_cast<const T*>(p.x) + start, static_cast<const Real*>(p.weight),
                                 p.head_dim, p.eps);
      }
    }
  });
}

}  // namespace dflash::DFLASH_ISA
