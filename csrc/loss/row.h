// The loss of one row and its gradient, in one source for the CPU and for CUDA. X is a number (CUDA) or a vector (CPU),
// and Real is the type of the sums. z are the student's logits after the softcap, y the teacher's logits.
#pragma once

#include "loss/params.h"
#ifdef __CUDACC__
#include "common/device.h"
#else
#include "common/simd.h"
#endif

namespace dflash::DFLASH_ISA {

// The origin of exponents. It is 0 for rows that hold nothing but -inf so far, because -inf - -inf would be NaN.
template <class Real>
DFLASH_INLINE Real finite_or_zero(Real max) {
  return max == -kInfinity ? Real(0) : max;
}

template <class Real>
struct Softcap {
  Real cap;  // 0: none
  template <class X>
  DFLASH_MEMBER X operator()(X x) const {  // cap * tanh(x / cap)
    return cap == 0 ? x : cap - 2 * cap / (exp_of(x * (2 / cap)) + 1);
  }
  template <class X>
  DFLASH_MEMBER X slope(X z) const {
    return cap == 0 ? X{} + 1 : 1 - (z / cap) * (z / cap);
  }
};

// Sums over a row, all relative to the same maxima: d = z - max, e = exp(d), u = exp(y - teacher_max).
template <class X>
struct Sums {
  X e{}, e_d{}, d{};      // of e, e * d, and, if labels are smoothed, d
  X u{}, u_difference{};  // of u, u * ((y - teacher_max) - d)

  template <bool kTeacher, bool kSmoothing, class Real>
  DFLASH_MEMBER void add(X z, X y, Real max, Real teacher_max) {
    const X dz = z - max;
    const X ez = exp_of(dz);
    e += ez;
    e_d += ez * (dz > -1e4f ? dz : X{} - 1e4f);  // 0 * -inf counts as 0
    if constexpr (kSmoothing) d += dz;
    if constexpr (kTeacher) {
      const X dy = y - teacher_max;
      const X uy = exp_of(dy);
      u += uy;
      u_difference += uy == 0 ? X{} : uy * (dy - dz);
    }
  }

  DFLASH_MEMBER void merge(const Sums& other) {
    e += other.e;
    e_d += other.e_d;
    d += other.d;
    u += other.u;
    u_difference += other.u_difference;
  }
};

// The online softmax (Milakov and Gimelshein, arXiv 1805.02867), extended to the entropy and to the teacher's sums.
template <class Real>
struct RowSums : Sums<Real> {
  Real max = -kInfinity, teacher_max = -kInfinity;
  Real count = 0;

  // Makes all sums relative to larger maxima.
  DFLASH_MEMBER void raise(Real new_max, Real new_teacher_max) {
    new_max = new_max > max ? new_max : max;
    new_teacher_max = new_teacher_max > teacher_max ? new_teacher_max : teacher_max;
    const Real shift = finite_or_zero(max) - finite_or_zero(new_max);
    const Real teacher_shift = finite_or_zero(teacher_max) - finite_or_zero(new_teacher_max);
    const Real scale = this->e == 0 ? Real(0) : exp_of(shift);
    const Real teacher_scale = this->u == 0 ? Real(0) : exp_of(teacher_shift);
    this->e_d = scale * (this->e_d + shift * this->e);
    this->e *= scale;
    this->d += shift * count;
    this->u_difference = teacher_scale * (this->u_difference + (teacher_shift - shift) * this->u);
    this->u *= teacher_scale;
    max = new_max;
    teacher_max = new_teacher_max;
  }

  DFLASH_MEMBER void merge(RowSums other) {
    raise(other.max, other.teacher_max);
    other.raise(max, teacher_max);
    Sums<Real>::merge(other);
    count += other.count;
  }
};

// What the second pass over a row needs from the first.
template <class Real>
struct RowStats {
  Real max, inverse_sum, teacher_max, teacher_inverse_sum, mean_sign;

  template <class X>
  DFLASH_MEMBER X probability(X z) const {
    return exp_of(z - max) * inverse_sum;
  }
  template <class X>
  DFLASH_MEMBER X teacher_probability(X y) const {
    return exp_of(y - teacher_max) * teacher_inverse_sum;
  }
};

// sign(p - t) / 2, which is the derivative of the total variation by p.
template <class X>
DFLASH_INLINE X half_sign(X p, X t) {
  const X half = X{} + 0.5f;
  return p > t ? half : (p < t ? -half : X{});
}

// The loss of one row:
//   (1 - mix) * ((1 - smoothing) * nll + smoothing * mean_v(-log p_v)) + z_loss * lse^2 + mix * distance(teacher, p)
template <class Real>
struct RowLoss {
  Softcap<Real> softcap;
  Real smoothing, z_loss, mix;
  Teacher teacher;
  Real vocab;

  DFLASH_MEMBER explicit RowLoss(const CrossEntropyParams& p)
      : softcap{Real(p.softcap)},
        smoothing(Real(p.label_smoothing)),
        z_loss(Real(p.z_loss)),
        mix(p.teacher_kind == Teacher::kNone ? Real(0) : Real(p.teacher_mix)),
        teacher(p.teacher_kind),
        vocab(Real(p.vocab)) {}

  DFLASH_MEMBER RowStats<Real> stats(const RowSums<Real>& sums) const {
    return {finite_or_zero(sums.max), 1 / sums.e, finite_or_zero(sums.teacher_max), 1 / sums.u, Real(0)};
  }

  struct Values {
    Real loss, nll, entropy;
  };

  // z_target: the target's score after the softcap.
  DFLASH_MEMBER Values values(const RowSums<Real>& sums, Real z_target, Real total_variation) const {
    const Real max = finite_or_zero(sums.max), log_sum = log_of(sums.e);
    const Real nll = log_sum - (z_target - max);
    Real hard = nll;
    if (smoothing != 0) hard = (1 - smoothing) * nll + smoothing * (log_sum - sums.d / vocab);
    Real loss = (1 - mix) * hard;
    if (z_loss != 0) loss += z_loss * (max + log_sum) * (max + log_sum);
    if (mix != 0) {
      const Real kl = sums.u_difference / sums.u - log_of(sums.u) + log_sum;
      loss += mix * (teacher == Teacher::kKL ? kl : total_variation);
    }
    return {loss, nll, log_sum - sums.e_d / sums.e};
  }
};

// scale * d(loss) / d(z) of one row, where z are the logits after the softcap.
template <class Real>
struct RowGradient {
  RowStats<Real> stats;
  Real factor, offset;  // the factor of exp(z - max), and what is subtracted for every token
  Real of_target;       // what is added for the target
  Real mix;             // the factor of the teacher's term
  Teacher teacher;

  DFLASH_MEMBER RowGradient(const RowLoss<Real>& loss, const RowStats<Real>& stats, Real scale)
      : stats(stats), mix(scale * loss.mix), teacher(loss.teacher) {
    const Real hard = scale * (1 - loss.mix);
    const Real lse = stats.max - log_of(stats.inverse_sum);
    factor = (hard + (loss.z_loss == 0 ? Real(0) : 2 * scale * loss.z_loss * lse)) * stats.inverse_sum;
    offset = hard * loss.smoothing / loss.vocab;
    of_target = -hard * (1 - loss.smoothing);
  }

  template <bool kTeacher, class X>
  DFLASH_MEMBER X at(X z, X y) const {
    const X e = exp_of(z - stats.max);
    X g = e * factor - offset;
    if constexpr (kTeacher) {
      const X p = e * stats.inverse_sum, t = stats.teacher_probability(y);
      g += mix * (teacher == Teacher::kKL ? p - t : p * (half_sign(p, t) - stats.mean_sign));
    }
    return g;
  }
};

}  // namespace dflash::DFLASH_ISA
