// The register block under every product of attention: kHeight x kWidth numbers of A B, where A is read number by
// number and B by vectors.
#pragma once

#include "common/simd.h"

namespace dflash::DFLASH_ISA {

template <class Real>
struct Block {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  static constexpr int kVectors = 2;
  static constexpr int kWidth = kVectors * kLanes;
  static constexpr int kHeight = kVectorBytes == 64 ? 8 : 4;  // all accumulators stay in registers
  using X = Vector<Real, kLanes>;

  X at[kHeight][kVectors];

  // Calls f(row, vector) for every vector of the block.
  template <class F>
  static DFLASH_MEMBER void each(F&& f) {
#pragma GCC unroll 8
    for (int m = 0; m < kHeight; ++m) {
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) f(m, n);
    }
  }

  DFLASH_MEMBER void clear() {
    each([&](int m, int n) __attribute__((always_inline)) { at[m][n] = X{}; });
  }
  DFLASH_MEMBER void load_from(const Real* c, int64_t stride) {
    each([&](int m, int n) __attribute__((always_inline)) { at[m][n] = load<X>(c + m * stride + n * kLanes); });
  }
  DFLASH_MEMBER void store_to(Real* c, int64_t stride) const {
    each([&](int m, int n) __attribute__((always_inline)) { store(c + m * stride + n * kLanes, at[m][n]); });
  }

  // Adds A B. A is [kHeight, depth] with strides (a_row, a_step), B [depth, kWidth] with rows b_step apart.
  DFLASH_MEMBER void multiply(const Real* a, int64_t a_row, int64_t a_step, const Real* b, int64_t b_step,
                              int64_t depth) {
    for (int64_t k = 0; k < depth; ++k) {
      X bk[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) bk[n] = load<X>(b + k * b_step + n * kLanes);
      each([&](int m, int n) __attribute__((always_inline)) { at[m][n] += a[m * a_row + k * a_step] * bk[n]; });
    }
  }
};

}  // namespace dflash::DFLASH_ISA
