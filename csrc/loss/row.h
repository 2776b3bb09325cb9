// The loss of one row and its gradient, once for the CPU and for CUDA. `X` is a number (CUDA) or a vector (CPU),
// `Real` the precision of the sums. z are the student's scores after the softcap, y the teacher's.
#pragma once

#include "loss/params.h"
#ifdef __CUDACC__
#include "common/device.h"
#else
#include "common/simd.h"
#endif

namespace dflash::DFLASH_ISA {

// Rows that hold nothing but -inf so far are measured from 0: -inf - -inf would be NaN.
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

// Sums over a row, all measured from the same maxima: with d = z - max, e = exp(d), u = exp(y - teacher_max).
template <class X>
struct Sums {
  X e{}, e_d{}, d{};     // of e, e * d, d
  X u{}, u_difference{};  // of u, u * ((y - teacher_max) - d)

  template <bool kTeacher, class Real>
  DFLASH_MEMBER void add(X z, X y, Real max, Real teacher_max) {
    const X dz = z - max;
    const X ez = exp_of(dz);
    e += ez;
    e_d += ez == 0 ? X{} : ez * dz;  // 0 * -inf counts as 0
    d += dz;
    if constexpr (kTeacher) {
      const X dy = y - teacher_max;
      const X uy = exp_of(dy);
      u += uy;
      u_difference += uy == 0 ? X{} : uy * (dy - dz);
    }
  }
};

// The online softmax (Milakov and Gimelshein, arXiv 1805.02867) carried on to entropy and to the teacher's sums.
template <class Real>
struct RowSums : Sums<Real> {
  Real max = -kInfinity, teacher_max = -kInfinity;
  Real count = 0;

  // Measures everything from larger maxima.
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
    this->e += other.e;
    this->e_d += other.e_d;
    this->d += other.d;
    this->u += other.u;
    this->u_difference += other.u_difference;
    count += other.count;
  }
};

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

  // What the second pass over a row needs.
  struct Stats {
    Real max, log_sum, teacher_max, teacher_log_sum, mean_sign;

    template <class X>
    DFLASH_MEMBER X probability(X z) const {
      return exp_of((z - max) - log_sum);
    }
    template <class X>
    DFLASH_MEMBER X teacher_probability(X y) const {
      return exp_of((y - teacher_max) - teacher_log_sum);
    }
  };

  DFLASH_MEMBER Stats stats(const RowSums<Real>& sums) const {
    return {finite_or_zero(sums.max), log_of(sums.e), finite_or_zero(sums.teacher_max), log_of(sums.u), Real(0)};
  }

  // sign(p - t) / 2: the slope of total variation in p.
  template <class X>
  DFLASH_MEMBER X half_sign(X p, X t) const {
    const X half = X{} + Real(0.5);
    return p > t ? half : (p < t ? -half : X{});
  }

  DFLASH_MEMBER Real nll(const Stats& s, Real z_target) const { return s.log_sum - (z_target - s.max); }

  DFLASH_MEMBER Real entropy(const RowSums<Real>& sums, const Stats& s) const { return s.log_sum - sums.e_d / sums.e; }

  DFLASH_MEMBER Real loss(const RowSums<Real>& sums, const Stats& s, Real nll, Real total_variation) const {
    Real hard = nll;
    if (smoothing != 0) hard = (1 - smoothing) * nll + smoothing * (s.log_sum - sums.d / vocab);
    Real loss = (1 - mix) * hard;
    if (z_loss != 0) loss += z_loss * (s.max + s.log_sum) * (s.max + s.log_sum);
    if (mix != 0) {
      const Real kl = sums.u_difference / sums.u - s.teacher_log_sum + s.log_sum;
      loss += mix * (teacher == Teacher::kKL ? kl : total_variation);
    }
    return loss;
  }

  // d(loss) / d(logit), but for the target's own term.
  template <bool kTeacher, class X>
  DFLASH_MEMBER X gradient(const Stats& s, X z, X y) const {
    const X p = s.probability(z);
    X g = p * (1 - mix + 2 * z_loss * (s.max + s.log_sum)) - (1 - mix) * smoothing / vocab;
    if constexpr (kTeacher) {
      const X t = s.teacher_probability(y);
      g += mix * (teacher == Teacher::kKL ? p - t : p * (half_sign(p, t) - s.mean_sign));
    }
    return g * softcap.slope(z);
  }

  DFLASH_MEMBER Real target_gradient(Real z) const { return -(1 - mix) * (1 - smoothing) * softcap.slope(z); }
};

}  // namespace dflash::DFLASH_ISA
