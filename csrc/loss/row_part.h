// A thread's or a block's part of a row, and what it does with a few neighbouring logits: for the CUDA kernels.
#pragma once

#include "loss/row.h"

namespace dflash::DFLASH_ISA {

constexpr float kNaN = __builtin_nanf("");

struct RowPart : RowSums<float> {
  float before = -kInfinity, rest = -kInfinity;  // largest logit before the target, and from it on

  DFLASH_INLINE void merge(const RowPart& other) {
    RowSums<float>::merge(other);
    before = fmaxf(before, other.before);
    rest = fmaxf(rest, other.rest);
  }

  // Is the target the argmax, the first if there are several?
  DFLASH_INLINE bool is_argmax(int target, float logit) const {
    return (target == 0 || logit > before) && logit >= rest;
  }

  // Adds the logits x of tokens [index, index + kCount), and the teacher's y.
  template <bool kTeacher, int kCount>
  DFLASH_INLINE void add(const RowLoss<float>& loss, int target, int index, const float (&x)[kCount],
                         const float (&y)[kCount]) {
    float largest = x[0], teacher_largest = kTeacher ? y[0] : -kInfinity;
#pragma unroll
    for (int k = 1; k < kCount; ++k) {
      largest = fmaxf(largest, x[k]);
      if constexpr (kTeacher) teacher_largest = fmaxf(teacher_largest, y[k]);
    }
    if (index + kCount <= target) {
      before = fmaxf(before, largest);
    } else if (index >= target) {
      rest = fmaxf(rest, largest);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (index + k < target) before = fmaxf(before, x[k]);
        if (index + k >= target) rest = fmaxf(rest, x[k]);
      }
    }
    largest = loss.softcap(largest);
    if (largest > max || (kTeacher && teacher_largest > teacher_max)) raise(largest, teacher_largest);
    const float origin = finite_or_zero(max), teacher_origin = finite_or_zero(teacher_max);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      Sums<float>::add<kTeacher>(loss.softcap(x[k]), y[k], origin, teacher_origin);
    }
    count += kCount;
  }
};

// scale * d(loss) / d(logit) of tokens [index, index + kCount).
template <bool kTeacher, int kCount>
DFLASH_INLINE void gradients(float (&out)[kCount], const RowLoss<float>& loss, const RowLoss<float>::Stats& stats,
                             float scale, int target, int index, const float (&x)[kCount], const float (&y)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float z = loss.softcap(x[k]);
    float g = loss.gradient<kTeacher>(stats, z, y[k]);
    if (index + k == target) g += loss.target_gradient(z);
    out[k] = scale * g;
  }
}

// What a CUDA kernel knows of its row before it reads a logit.
struct RowHead {
  const CrossEntropyParams& params;
  const int64_t row;
  const int target;  // -1 outside the vocabulary: such a row becomes NaN
  const float weight;

  DFLASH_INLINE RowHead(const CrossEntropyParams& p, int64_t row)
      : params(p), row(row), target(p.target[row] >= 0 && p.target[row] < p.vocab ? int(p.target[row]) : -1),
        weight(p.weight ? static_cast<const float*>(p.weight)[row] : 1.f) {}

  DFLASH_INLINE int64_t start(const RowStrides& s) const {
    return row / params.inner * s.outer + row % params.inner * s.inner;
  }

  DFLASH_INLINE void write(float loss, float nll, float entropy, bool correct) const {
    static_cast<float*>(params.losses)[row] = weight * loss;
    static_cast<float*>(params.nll)[row] = nll;
    static_cast<float*>(params.entropy)[row] = entropy;
    params.correct[row] = correct;
  }

  // For one thread: everything that the forward returns of the row.
  DFLASH_INLINE void write(const RowLoss<float>& loss, const RowPart& sums, const RowLoss<float>::Stats& stats,
                           float logit, float total_variation) const {
    const float nll = loss.nll(stats, loss.softcap(logit));
    write(loss.loss(sums, stats, nll, total_variation), nll, loss.entropy(sums, stats), sums.is_argmax(target, logit));
  }
};

}  // namespace dflash::DFLASH_ISA
