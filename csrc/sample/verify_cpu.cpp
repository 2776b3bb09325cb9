// Speculative sampling on the CPU. The logits of a token are read only when it is reached.
#include "sample/random.h"
#include "sample/row_cpu.h"

namespace dflash::DFLASH_ISA {

struct Verdict {
  int64_t accepted, next_token;
};

// The type of the target's logits as they are used: as they lie in memory, or as the penalties leave them.
template <class T, class Real, bool kPenalised>
struct TargetType {
  using type = T;
};
template <class T, class Real>
struct TargetType<T, Real, true> {
  using type = Real;
};

template <class T, class Real, bool kPenalised>
class Verifier {
  using X = typename TargetType<T, Real, kPenalised>::type;
  using Wide = typename Logits<T, Real>::Wide;

 public:
  explicit Verifier(const VerifyParams& p)
      : p_(p), penalised_(kPenalised ? p.vocab : 0), target_(p.vocab, p.filters.any),
        draft_(p.draft == Draft::kFiltered ? p.vocab : 0, p.filters.any) {}

  Verdict verify(int64_t row) const {
    const Filters<Real> filters(p_.filters, row);
    const int64_t* tokens = p_.tokens + row * p_.drafted;
    const int64_t drafted = p_.lens ? larger(int64_t(0), smaller(p_.lens[row], p_.drafted)) : p_.drafted;
    return filters.temperature == 0 ? verify_greedy(row, tokens, drafted)
                                    : verify_sampled(row, tokens, drafted, filters);
  }

 private:
  Verdict verify_greedy(int64_t row, const int64_t* tokens, int64_t drafted) const {
    for (int64_t k = 0;; ++k) {
      Row<X, Real> target(target_logits(row, k), p_.vocab, 1, target_);
      target.read_maxima();
      if (k == drafted || tokens[k] != target.argmax()) return {k, target.argmax()};
    }
  }

  Verdict verify_sampled(int64_t row, const int64_t* tokens, int64_t drafted, const Filters<Real>& filters) const {
    const double draw = uniform(row, p_.drafted);
    for (int64_t k = 0;; ++k) {
      Row<X, Real> target = filtered<X>(target_logits(row, k), filters, target_);
      if (k == drafted) return {k, target.draw(draw)};

      const Masses<X, Real> p = target.probabilities();
      const int64_t drafted_token = tokens[k];
      int64_t token;
      if (is_point_mass(row, k)) {
        if (uniform(row, k) < p[drafted_token]) continue;
        token = target.draw(draw, [&](int64_t i) DFLASH_LAMBDA {
          Wide mass = p.at(i);
          if (i <= drafted_token && drafted_token < i + lanes_of<Wide>) mass[drafted_token - i] = 0;
          return mass;
        });
      } else {
        const Masses<T, Real> q = draft_probabilities(row, k, filters);
        // A token that q could not have drawn is rejected, for example if its logits are NaN.
        const Real chance = q[drafted_token];
        if (chance > 0 && uniform(row, k) * chance < p[drafted_token]) continue;
        token = target.draw(draw, [&](int64_t i) DFLASH_LAMBDA { return larger(p.at(i) - q.at(i), Wide{}); });
      }
      // If p = q, the residual is only rounding, and so was the rejection.
      if (token < 0) token = target.draw(draw, [&](int64_t i) DFLASH_LAMBDA { return p.at(i); });
      return {k, larger(token, int64_t(0))};  // without any mass (NaN) this is the first token, as of argmax
    }
  }

  // A pivot of +inf marks a draft from logits of +inf.
  bool is_point_mass(int64_t row, int64_t k) const {
    return p_.draft == Draft::kPoint ||
           (p_.draft == Draft::kDescribed && static_cast<const Real*>(p_.pivots)[row * p_.drafted + k] == kInfinity);
  }

  Masses<T, Real> draft_probabilities(int64_t row, int64_t k, const Filters<Real>& filters) const {
    const T* x = logits(p_.draft_logits, p_.draft_strides, row, k);
    if (p_.draft == Draft::kFiltered) return filtered<T>(x, filters, draft_).probabilities();
    const Real pivot = static_cast<const Real*>(p_.pivots)[row * p_.drafted + k];
    const Real normaliser = static_cast<const Real*>(p_.normalisers)[row * p_.drafted + k];
    const Real t = filters.temperature;
    return {{x, p_.vocab}, smallest_logit(pivot, t), normaliser * t, 1 / t, 1};
  }

  template <class Y>
  Row<Y, Real> filtered(const Y* x, const Filters<Real>& filters,
                        const typename Row<Y, Real>::Workspace& workspace) const {
    auto row = Row<Y, Real>::read(x, p_.vocab, filters.temperature, workspace);
    if (p_.filters.any) row.filter(filters);
    return row;
  }

  const X* target_logits(int64_t row, int64_t k) const {
    const T* x = logits(p_.target, p_.target_strides, row, k);
    if constexpr (kPenalised) {
      return penalised_.of(x, Penalties<Real>::of(p_.penalties, row, p_.vocab, p_.tokens + row * p_.drafted, k));
    } else {
      return x;
    }
  }

  static const T* logits(const void* tensor, const RowStrides& strides, int64_t row, int64_t k) {
    return static_cast<const T*>(tensor) + row * strides.outer + k * strides.inner;
  }

  double uniform(int64_t row, int64_t column) const {
    return p_.uniforms ? p_.uniforms[row * (p_.drafted + 1) + column]
                       : uniform_of(p_.seed, kVerifyStream, row, column);
  }

  const VerifyParams& p_;
  const PenalisedLogits<Real> penalised_;
  const typename Row<X, Real>::Workspace target_;
  const typename Row<T, Real>::Workspace draft_;
};

template <class T, class Real, bool kPenalised>
static void verify_rows(const VerifyParams& params, int64_t begin, int64_t end) {
  const Verifier<T, Real, kPenalised> verifier(params);
  for (int64_t row = begin; row < end; ++row) {
    const Verdict verdict = verifier.verify(row);
    params.accepted[row] = verdict.accepted;
    params.next_token[row] = verdict.next_token;
  }
}

void verify(const VerifyParams& params, int64_t begin, int64_t end) {
  with_types(params.dtype, [&](auto logit, auto real) {
    using T = decltype(logit);
    using Real = decltype(real);
    params.penalties.any() ? verify_rows<T, Real, true>(params, begin, end)
                           : verify_rows<T, Real, false>(params, begin, end);
  });
}

}  // namespace dflash::DFLASH_ISA
