// The logit bias and the penalties of a row, in one source for the CPU and for CUDA. The rules are those of
// `penalised_logits` in dflash_ext/reference/penalties.py.
#pragma once

#include "sample/filters.h"

namespace dflash::DFLASH_ISA {

// A product that is rounded before it is added to something, so that every pass over a row finds the same logits.
#ifdef __CUDACC__
DFLASH_INLINE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
#else
template <class Real>
DFLASH_INLINE Real rounded_product(Real a, Real b) {
  return a * b;  // CPU kernels are compiled without contraction
}
#endif

template <class Real>
struct Penalties {
  const int32_t* counts;  // [vocab]; null: no penalties
  const Real* bias;       // [vocab]; null: none
  Real repetition, inverse_repetition, presence, frequency;
  const int64_t* drafts;  // tokens that count beside `counts`
  int drafted;

  // Values in tensors are not checked: a repetition penalty that is not above 0, and others that are NaN, are off.
  DFLASH_MEMBER static Penalties of(const PenaltyParams& p, int64_t row, int64_t vocab, const int64_t* drafts,
                                    int64_t drafted) {
    const int64_t table = p.tables ? p.tables[row] : row;
    Penalties own;
    own.counts = p.counts ? p.counts + table * vocab : nullptr;
    own.bias = p.bias ? static_cast<const Real*>(p.bias) + table * p.bias_stride : nullptr;
    const Real repetition = value_of<Real>(p.repetition, row), presence = value_of<Real>(p.presence, row),
               frequency = value_of<Real>(p.frequency, row);
    own.repetition = repetition > 0 ? repetition : 1;
    own.inverse_repetition = 1 / own.repetition;
    own.presence = presence == presence ? presence : 0;
    own.frequency = frequency == frequency ? frequency : 0;
    own.drafts = drafts;
    own.drafted = p.counts ? int(drafted) : 0;
    return own;
  }

  // Returns a token's count with one more of it. Tokens of the prompt alone have a count of -1.
  DFLASH_MEMBER static int one_more(int count) { return (count > 0 ? count : 0) + 1; }

  DFLASH_MEMBER int count_of(int64_t token) const {
    int count = counts ? counts[token] : 0;
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int j = 0; j < drafted; ++j) count = drafts[j] == token ? one_more(count) : count;
    return count;
  }

  // Returns a logit, to which the bias has been added, after the penalties of this count.
  DFLASH_MEMBER Real with_count(Real x, int count) const {
    if (count == 0) return x;
    x = rounded_product(x, x > 0 ? inverse_repetition : repetition);
    return count > 0 ? x - rounded_product(frequency, Real(count)) - presence : x;
  }
  DFLASH_MEMBER Real operator()(Real x, int64_t token) const {
    return with_count(bias ? x + bias[token] : x, count_of(token));
  }
};

}  // namespace dflash::DFLASH_ISA
