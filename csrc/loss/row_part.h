// For the CUDA kernels: the sums of a thread's or a block's part of a row, and what they add and compute for a few
// neighbouring logits.
#pragma once

#include "loss/row.h"

namespace dflash::DFLASH_ISA {

constexpr float kNaN = __builtin_nanf("");

// Applies the softcap, with one branch for all logits.
template <int kCount>
DFLASH_INLINE void softcapped(float (&z)[kCount], const Softcap<float>& softcap, const float (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) z[k] = x[k];
  if (softcap.cap != 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) z[k] = softcap(x[k]);
  }
}

// The largest of these, found in few steps that wait for each other.
template <int kCount>
DFLASH_INLINE float largest_of(const float (&x)[kCount]) {
  float best[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) best[k] = x[k];
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int k = 0; k + step < kCount; k += 2 * step) best[k] = fmaxf(best[k], best[k + step]);
  }
  return best[0];
}

// A thread keeps the largest of its first logits of type T as the origin of its exponents, until one is larger than it
// by this. e^30 times the number of logits is far below the largest float. The larger an exponent, the less exact is its
// exponential, which 16-bit logits do not show; so the origin of float logits is always the largest.
template <class T>
constexpr float kSlack = sizeof(T) == 4 ? 0 : 30;

struct RowPart : RowSums<float> {
  float before = -kInfinity, rest = -kInfinity;  // largest logit before the target, and from it on

  DFLASH_INLINE void merge(const RowPart& other) {
    RowSums<float>::merge(other);
    before = fmaxf(before, other.before);
    rest = fmaxf(rest, other.rest);
  }

  // Whether the target is the argmax, which is the first of several largest logits.
  DFLASH_INLINE bool is_argmax(int target, float logit) const {
    return (target == 0 || logit > before) && logit >= rest;
  }

  // Adds the logits x of tokens [index, index + kCount), and the teacher's logits y.
  template <class T, bool kTeacher, int kCount>
  DFLASH_INLINE void add(const RowLoss<float>& loss, int target, int index, const float (&x)[kCount],
                         const float (&y)[kCount]) {
    float largest = largest_of(x), teacher_largest = kTeacher ? largest_of(y) : -kInfinity;
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
    float z[kCount];
    softcapped(z, loss.softcap, x);
    largest = loss.softcap(largest);
    if (largest > max + kSlack<T> || (kTeacher && teacher_largest > teacher_max + kSlack<T>)) {
      raise(largest, teacher_largest);
    }
    if (loss.smoothing != 0) {
      add_all<kTeacher, true>(z, y);
    } else {
      add_all<kTeacher, false>(z, y);
    }
    count += kCount;
  }

 private:
  template <bool kTeacher, bool kSmoothing, int kCount>
  DFLASH_INLINE void add_all(const float (&z)[kCount], const float (&y)[kCount]) {
    const float origin = finite_or_zero(max), teacher_origin = finite_or_zero(teacher_max);
    Sums<float> odd;  // sums of their own, so that additions wait less for each other
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      Sums<float>& sums = k % 2 ? odd : *this;
      sums.template add<kTeacher, kSmoothing>(z[k], y[k], origin, teacher_origin);
    }
    Sums<float>::merge(odd);
  }
};

// Returns the gradients of the logits x of tokens [index, index + kCount). y are the teacher's logits.
template <bool kTeacher, int kCount>
DFLASH_INLINE void gradients(float (&out)[kCount], const RowGradient<float>& gradient, const Softcap<float>& softcap,
                             int target, int index, const float (&x)[kCount], const float (&y)[kCount]) {
  float z[kCount];
  softcapped(z, softcap, x);
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k] = gradient.at<kTeacher>(z[k], y[k]);
  if (index <= target && target < index + kCount) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) out[k] += index + k == target ? gradient.of_target : 0.f;
  }
  if (softcap.cap != 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) out[k] *= softcap.slope(z[k]);
  }
}

// What a CUDA kernel knows about its row before it reads a logit.
struct RowHead {
  const CrossEntropyParams& params;
  const int64_t row;
  const int target;  // -1 if it is outside the vocabulary; the row becomes NaN
  const float weight;

  DFLASH_INLINE RowHead(const CrossEntropyParams& p, int64_t row)
      : params(p), row(row), target(p.target[row] >= 0 && p.target[row] < p.vocab ? int(p.target[row]) : -1),
        weight(p.weight ? static_cast<const float*>(p.weight)[row] : 1.f) {}

  DFLASH_INLINE int64_t start(const RowStrides& s) const {
    return row / params.inner * s.outer + row % params.inner * s.inner;
  }

  // One thread of the row calls this.
  DFLASH_INLINE void write(const RowLoss<float>::Values& values, bool correct) const {
    static_cast<float*>(params.losses)[row] = weight * values.loss;
    static_cast<float*>(params.nll)[row] = values.nll;
    static_cast<float*>(params.entropy)[row] = values.entropy;
    params.correct[row] = correct;
  }
};

}  // namespace dflash::DFLASH_ISA
