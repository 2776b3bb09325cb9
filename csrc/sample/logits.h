// A row of logits in memory on the CPU, and masses (unnormalised probabilities of its tokens).
#pragma once

#include "common/simd.h"
#include "sample/penalties.h"

namespace dflash::DFLASH_ISA {

template <class T, class Real>
struct Logits {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  using Wide = Vector<Real, kLanes>;

  const T* x;
  int64_t vocab;

  // Returns the logits of tokens [i, i + kLanes); past the end they are -inf.
  DFLASH_MEMBER Wide at(int64_t i) const {
    if (i + kLanes <= vocab) return load<Wide>(x + i);
    Wide v = Wide{} - kInfinity;
    for (int lane = 0; i + lane < vocab; ++lane) v[lane] = (*this)[i + lane];
    return v;
  }
  DFLASH_MEMBER Real operator[](int64_t token) const { return load<Vector<Real, 1>>(x + token)[0]; }
};

// A row of logits after its bias and its penalties. It is scratch memory, which a thread's rows use one after another.
template <class Real>
class PenalisedLogits {
 public:
  explicit PenalisedLogits(int64_t vocab) : logits_(vocab + Logits<Real, Real>::kLanes), vocab_(vocab) {}

  template <class T>
  const Real* of(const T* x, const Penalties<Real>& penalties) const {
    using Wide = typename Logits<Real, Real>::Wide;
    constexpr int kLanes = lanes_of<Wide>;
    const Logits<T, Real> from{x, vocab_};
    const Logits<Real, Real> bias{penalties.bias, vocab_};
    for (int64_t i = 0; i < vocab_; i += kLanes) {
      store(logits_.data() + i, penalties.bias ? from.at(i) + bias.at(i) : from.at(i));
    }
    if (penalties.counts == nullptr) return logits_.data();
    for (int64_t i = 0; i < vocab_; ++i) {
      if (penalties.counts[i] != 0) logits_.data()[i] = penalties(from[i], i);
    }
    for (int j = 0; j < penalties.drafted; ++j) {
      const int64_t token = penalties.drafts[j];
      logits_.data()[token] = penalties(from[token], token);
    }
    return logits_.data();
  }

 private:
  const Array<Real> logits_;
  const int64_t vocab_;
};

// Masses: exp((x - origin) / temperature) * scale for tokens whose logit x is at least `lowest`, 0 for the others.
template <class T, class Real>
struct Masses {
  using Wide = typename Logits<T, Real>::Wide;

  Logits<T, Real> logits;
  Real lowest, origin, inverse_temperature, scale;

  DFLASH_MEMBER Wide at(int64_t i) const {
    const Wide x = logits.at(i);
    return x >= lowest ? exp_of((x - origin) * inverse_temperature) * scale : Wide{};
  }
  DFLASH_MEMBER Real operator[](int64_t token) const {
    const Real x = logits[token];
    return x >= lowest ? exp_of((x - origin) * inverse_temperature) * scale : Real(0);
  }
};

}  // namespace dflash::DFLASH_ISA
