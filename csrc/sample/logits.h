// A row of logits in memory on the CPU, and masses (unnormalised probabilities of its tokens).
#pragma once

#include "common/simd.h"
#include "sample/filters.h"

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
