// The register block that computes all matrix products of attention on the CPU: kHeight x kWidth numbers of A B, where
// A is read number by number and B by vectors.
#pragma once

#include "common/simd.h"

namespace dflash::DFLASH_ISA {

// kVectors is 2, or 1 if one vector is already wider than the work.
template <class Real, int kVectors_ = 2>
struct Block {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  static constexpr int kVectors = kVectors_;
  static constexpr int kWidth = kVectors * kLanes;
  static constexpr int kHeight = kVectorBytes == 64 || kVectors == 1 ? 8 : 4;  // accumulators stay in registers
  using Number = Real;
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

  DFLASH_MEMBER void add(const Block& other) {
    each([&](int m, int n) DFLASH_LAMBDA { at[m][n] += other.at[m][n]; });
  }
  DFLASH_MEMBER void store_to(Real* c, int64_t stride) const {
    each([&](int m, int n) DFLASH_LAMBDA { store(c + m * stride + n * kLanes, at[m][n]); });
  }
  DFLASH_MEMBER void add_to(Real* c, int64_t stride) const {
    each([&](int m, int n) DFLASH_LAMBDA {
      store(c + m * stride + n * kLanes, load<X>(c + m * stride + n * kLanes) + at[m][n]);
    });
  }

  // Computes A B. A is [kHeight, depth] with strides (a_row, a_step), B is [depth, kWidth] with rows b_step apart. The
  // depth is summed in pieces, so that rounding errors do not grow with it.
  DFLASH_MEMBER void multiply(const Real* a, int64_t a_row, int64_t a_step, const Real* b, int64_t b_step,
                              int64_t depth) {
    constexpr int64_t kPiece = 64;
    multiply_piece(a, a_row, a_step, b, b_step, depth < kPiece ? depth : kPiece);
    for (int64_t k = kPiece; k < depth; k += kPiece) {
      Block more;
      const int64_t rest = depth - k < kPiece ? depth - k : kPiece;
      more.multiply_piece(a + k * a_step, a_row, a_step, b + k * b_step, b_step, rest);
      add(more);
    }
  }

 private:
  DFLASH_MEMBER void multiply_piece(const Real* a, int64_t a_row, int64_t a_step, const Real* b, int64_t b_step,
                                    int64_t depth) {
    each([&](int m, int n) DFLASH_LAMBDA { at[m][n] = X{}; });
    for (int64_t k = 0; k < depth; ++k) {
      X bk[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) bk[n] = load<X>(b + k * b_step + n * kLanes);
      each([&](int m, int n) DFLASH_LAMBDA { at[m][n] += a[m * a_row + k * a_step] * bk[n]; });
    }
  }
};

}  // namespace dflash::DFLASH_ISA
