// Selection without a sort: finds the number at which a weighted set splits by a given weight.
#pragma once

#include "common/simd.h"

namespace dflash::DFLASH_ISA {

template <class V>
DFLASH_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
DFLASH_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}

// Finite numbers and their weights, in arrays with room for one more vector.
template <class Real>
struct Weighted {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  using Wide = Vector<Real, kLanes>;
  static constexpr int64_t kPiece = 1024;  // numbers; a piece is summed in Real, and the pieces' sums in double

  Real *values, *weights;
  int64_t count;

  DFLASH_MEMBER void append(Wide v, MaskOf<Wide> keep) { count += compact(values + count, v, keep); }

  // Sets the weight of every number. It must precede all of the following.
  template <class Weight>
  DFLASH_MEMBER void weigh(Weight&& weight) {
    pad();
    for (int64_t i = 0; i < count; i += kLanes) store(weights + i, weight(load<Wide>(values + i)));
  }

  struct Split {
    double weight_above = 0;
    Real smallest_above, largest_below;  // +-inf if there is none; the threshold itself counts as below
  };

  Split split(Real threshold) const {
    Split result;
    Wide above = Wide{} + kInfinity, below = Wide{} - kInfinity;
    for (int64_t begin = 0; begin < count; begin += kPiece) {
      Wide weight{};
      for (int64_t i = begin; i < count && i < begin + kPiece; i += kLanes) {
        const Wide v = load<Wide>(values + i);
        weight += v > threshold ? load<Wide>(weights + i) : Wide{};
        above = v > threshold ? smaller(v, above) : above;
        below = v <= threshold ? larger(v, below) : below;
      }
      result.weight_above += sum_lanes(weight);
    }
    result.smallest_above = -max_lanes(-above);
    result.largest_below = max_lanes(below);
    return result;
  }

  // Returns the smallest number for which those above it weigh less than `limit`; if there is none, the largest, which
  // is `high`. No number is below `low`. The range is halved until it holds one number, and numbers outside are
  // dropped.
  Real select(Real low, Real high, double limit) {
    while (low < high) {
      const Real middle = low + (high - low) / 2;
      const Real threshold = middle < high ? middle : low;  // right for an infinite difference as well
      const Split parts = split(threshold);
      if (parts.weight_above >= limit) {
        low = parts.smallest_above;
        keep_if([=](Wide v) DFLASH_LAMBDA { return v > threshold; });
      } else if (parts.largest_below == -kInfinity) {
        return parts.smallest_above;
      } else {
        limit -= parts.weight_above;
        high = parts.largest_below;
        keep_if([=](Wide v) DFLASH_LAMBDA { return v <= threshold; });
      }
    }
    return high;
  }

 private:
  template <class Predicate>
  DFLASH_MEMBER void keep_if(Predicate&& predicate) {
    const int64_t before = count;
    count = 0;
    for (int64_t i = 0; i < before; i += kLanes) {
      const Wide v = load<Wide>(values + i), w = load<Wide>(weights + i);
      compact(weights + count, w, predicate(v));
      append(v, predicate(v));
    }
    pad();
  }

  // NaN is neither above nor below anything.
  DFLASH_MEMBER void pad() {
    for (int lane = 0; lane < kLanes; ++lane) values[count + lane] = __builtin_nan("");
  }
};

}  // namespace dflash::DFLASH_ISA
