// One draw per row on the CPU, with the statistics of the row's distribution.
#include "sample/random.h"
#include "sample/row_cpu.h"

namespace dflash::DFLASH_ISA {

template <class T, class Real>
static void sample_row(const SampleParams& p, int64_t n, const T* logits,
                       const typename Row<T, Real>::Workspace& workspace) {
  const Filters<Real> filters(p.filters, n);
  auto row = Row<T, Real>::read(logits, p.vocab, filters.temperature, workspace);

  const auto set = [&](SampleReal which, Real value) { static_cast<Real*>(p.reals)[which * p.rows + n] = value; };
  int64_t token = row.argmax();
  if (filters.temperature == 0) {
    set(kPivot, row.max());
    set(kNormaliser, row.max());
    set(kFilteredEntropy, 0);
  } else {
    if (p.filters.any) row.filter(filters);
    token = row.draw(uniform_of(p.seed, kSampleStream, n, 0));
    set(kPivot, row.pivot());
    set(kNormaliser, row.normaliser());
    set(kFilteredEntropy, row.kept().entropy());
  }
  if (row.is_certain()) set(kPivot, kInfinity);
  const double sum = row.sums().e;
  const Real logprob = row.exponent(row.logit(token)) - Real(__builtin_log(sum));
  set(kProb, exp_of(logprob));
  set(kLogprob, logprob);
  set(kEntropy, row.sums().entropy());
  set(kMargin, Real((1 - exp_of(row.exponent(row.second()))) / sum));
  set(kMaxProb, Real((1 + row.exponent(row.max())) / sum));  // 0 in the exponent, or NaN
  if (p.confidence) set(kConfidence, row.probability_at_1(token));
  p.ids[kToken * p.rows + n] = token;
  p.ids[kArgmax * p.rows + n] = row.argmax();
}

template <class T, class Real>
static void sample_rows(const SampleParams& p, int64_t begin, int64_t end) {
  const auto logits = [&](int64_t n) { return static_cast<const T*>(p.logits) + n * p.stride; };
  if (p.penalties.any()) {
    const typename Row<Real, Real>::Workspace workspace(p.vocab, p.filters.any);
    const PenalisedLogits<Real> penalised(p.vocab);
    for (int64_t n = begin; n < end; ++n) {
      const auto penalties = Penalties<Real>::of(p.penalties, n, p.vocab, nullptr, 0);
      sample_row<Real, Real>(p, n, penalised.of(logits(n), penalties), workspace);
    }
  } else {
    const typename Row<T, Real>::Workspace workspace(p.vocab, p.filters.any);
    for (int64_t n = begin; n < end; ++n) sample_row<T, Real>(p, n, logits(n), workspace);
  }
}

void sample(const SampleParams& params, int64_t begin, int64_t end) {
  with_types(params.dtype, [&](auto logit, auto real) {
    sample_rows<decltype(logit), decltype(real)>(params, begin, end);
  });
}

}  // namespace dflash::DFLASH_ISA
