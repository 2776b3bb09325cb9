// The rotary embedding of one head on the CPU.
#pragma once

#include "common/simd.h"

namespace dflash::DFLASH_ISA {

// Rotates the pairs (head[i], head[angles + i]) by `angles` angles, of which cos and sin are given.
template <class Real>
DFLASH_INLINE void rotate_halves(Real* head, const Real* cos, const Real* sin, int64_t angles) {
  for_each_lanes<Real>(angles, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
    using X = decltype(lanes);
    const X c = load<X>(cos + i), s = load<X>(sin + i);
    const X first = load<X>(head + i), second = load<X>(head + angles + i);
    store(head + i, first * c - second * s);
    store(head + angles + i, second * c + first * s);
  });
}

}  // namespace dflash::DFLASH_ISA
