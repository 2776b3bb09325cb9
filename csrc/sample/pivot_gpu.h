// Top-k and top-p without a sort of the row, on a GPU. A histogram over the logits between two bounds says in which bin
// the pivot lies; the logits of that bin are then collected, and sorted. Histograms count in integers, and sums are
// added in one order, so that the pivot does not depend on the order in which blocks run.
#pragma once

#include "sample/row_gpu.h"

namespace dflash::DFLASH_ISA {

constexpr int kBins = 1024;
constexpr int kMaxCandidates = 2048;

// What a logit weighs in the search of a pivot.
enum class Weight { kOne, kMass };

struct PivotMemory {
  uint32_t bins[kBins];
  Sums above[kMaxTiles];         // the weights of the logits above the candidates
  float candidates[kMaxCandidates];  // of this block
  float sorted[kMaxCandidates];      // of the team
  double warp_totals[kWarps];
  int count, smallest, largest;  // the block's candidates; the last two as ordered_bits
  float lowest;                  // no candidate is below it
  float above_sum;               // of `above`
};

// Integers in the order of floats.
DFLASH_INLINE int ordered_bits(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
DFLASH_INLINE float from_ordered_bits(int bits) { return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff)); }

template <class Source, class Team>
class PivotSearch {
 public:
  DFLASH_INLINE PivotSearch(const Row<Source, Team>& row, PivotMemory& memory)
      : row_(row), memory_(memory), mass_{-kInfinity, row.max(), row.rate(), 1} {}

  // Returns the k-th largest logit; -inf if there are fewer.
  DFLASH_INLINE float by_count(float k) {
    if (k <= row_.tiles()) {
      const float bound = largest_maximum(int(k));
      if (bound > -kInfinity && collect(Weight::kOne, all_from(bound))) return select(Weight::kOne, k);
    }
    // The last bin holds all that is below its range. Rows of normally distributed logits lie within the range.
    const float spread = row_.max() - smallest_maximum();
    return search(Weight::kOne, k, row_.max() - 6 * spread, -kLargest);
  }

  // Returns the smallest of the logits from `lowest` on for which those above it have less than `limit` of the mass.
  // has_few_candidates: few logits are expected to reach `lowest`.
  DFLASH_INLINE float by_mass(double limit, float lowest, bool has_few_candidates) {
    if (has_few_candidates && collect(Weight::kMass, all_from(lowest))) return select(Weight::kMass, limit);
    return search(Weight::kMass, limit, lowest, lowest);
  }

 private:
  static constexpr float kLargest = 3.402823466e38f;

  // Candidates are the logits of at least `lowest` whose position is not before `first`.
  struct Range {
    float high, scale;  // the position of a logit x is (high - x) * scale
    float first, lowest;
    float last;  // the end of the positions of which the bounds are taken; NaN: there is none

    DFLASH_INLINE float position(float x) const { return (high - x) * scale; }
  };

  DFLASH_INLINE Range all_from(float lowest) const { return {row_.max(), 0, 0, margin_below(lowest, row_.max()), 1}; }

  // A number below x by more than smallest_logit may go.
  DFLASH_INLINE static float margin_below(float x, float high) {
    return fmaxf(x - 0x1p-20f * fmaxf(fabsf(x), fabsf(high)), -kLargest);
  }

  // Narrows the range [low, high] until few logits are left. Logits below `low` count if they are at least `lowest`.
  DFLASH_INLINE float search(Weight weight, double limit, float low, float lowest) {
    constexpr int kMaxRounds = 16;
    float high = row_.max();
    double above = 0;
    for (int round = 0; round < kMaxRounds; ++round) {
      const Range range = narrowed(weight, limit, low, high, lowest, above, round);
      if (range.scale < 0) return -kInfinity;
      const bool fits = collect(weight, range);
      if (fits) return select(weight, limit);
      low = smallest_;
      high = largest_;
      above = memory_.above_sum;
      lowest = low;
      if (low == high) return low;
    }
    return low;
  }

  // Returns the bins in which the pivot may lie.
  DFLASH_INLINE Range narrowed(Weight weight, double limit, float low, float high, float lowest, double above,
                               int round) {
    const float scale = fminf(kBins / fminf(high - low, kLargest), kLargest);
    const float bin_exponent = row_.rate() / scale, high_exponent = mass_.exponent(high);
    // The weights of a bin add up to less than 2^32.
    const int bits = min(20, __clz(row_.vocab()));
    const float unit = weight == Weight::kOne ? 1.f : float(1 << bits);
    Range range{high, scale, 0, lowest, 0};

    for (int b = threadIdx.x; b < kBins; b += kThreads) memory_.bins[b] = 0;
    __syncthreads();
    row_.for_each_own_tile([&](int t) {
      if (row_.tile(t).best.first < lowest) return;
      row_.for_each_logit(t, [&](float x) {
        if (!(x >= lowest && x <= high)) return;
        const float position = range.position(x);
        const int bin = min(__float2int_rz(position), kBins - 1);
        // The mass relative to that of the upper edge of the bin.
        const uint32_t own =
            weight == Weight::kOne ? 1 : __float2uint_rn(exp2_of((bin - position) * bin_exponent) * unit);
        atomicAdd(&memory_.bins[bin], own);
      });
    });
    Team::sync();
    constexpr int kPerThread = kBins / kThreads;
    uint32_t by_block[Team::kLargest][kPerThread];  // loaded at once
#pragma unroll
    for (int r = 0; r < Team::kLargest; ++r) {
      const uint32_t* const bins = Team::of(memory_.bins, min(r, Team::size() - 1)) + threadIdx.x * kPerThread;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) by_block[r][i] = bins[i];
    }
    double weights[kPerThread], own = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int bin = threadIdx.x * kPerThread + i;
      uint32_t count = 0;
#pragma unroll
      for (int r = 0; r < Team::kLargest; ++r) count += r < Team::size() ? by_block[r][i] : 0;
      weights[i] = weight == Weight::kOne ? double(count)
                                          : double(float(count) / unit * exp2_of(high_exponent - bin * bin_exponent));
      own += weights[i];
    }
    double passed = block_scan(own) - own;
    const double all = above + memory_.warp_totals[kWarps - 1];
    // Rounded masses are within this of the true ones. It is 0 at last, so that every round narrows the range.
    const double tolerance = weight == Weight::kOne || round >= 4 ? 0 : 1.0 / unit + 1e-6;
    int first = 0, last = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      last += __syncthreads_count(above + passed * (1 - tolerance) < limit);
      passed += weights[i];
      first += __syncthreads_count(above + passed * (1 + tolerance) < limit);
    }
    Team::sync();  // the bins are read
    if (weight == Weight::kOne && all < limit) range.scale = -1;
    first = min(first, kBins - 1);
    last = max(min(last - 1, kBins - 1), first);
    range.first = first;
    range.last = last == kBins - 1 ? __int_as_float(0x7fffffff) : last + 1.f;
    range.lowest = margin_below(last == kBins - 1 ? lowest : fmaxf(lowest, high - range.last / scale), high);
    return range;
  }

  // Collects the candidates of the team in memory.sorted, and the weight above them. Returns whether they fit; if they
  // do not, smallest_ and largest_ are their bounds.
  DFLASH_INLINE bool collect(Weight weight, const Range& range) {
    if (threadIdx.x == 0) {
      memory_.count = 0;
      memory_.smallest = ordered_bits(kInfinity);
      memory_.largest = ordered_bits(-kInfinity);
    }
    __syncthreads();
    float smallest = kInfinity, largest = -kInfinity;
    row_.for_each_own_tile([&](int t) {
      float above = 0;
      if (row_.tile(t).best.first >= range.lowest) {
        row_.for_each_logit(t, [&](float x) {
          if (!(x >= range.lowest)) return;
          const float position = range.position(x);
          if (position < range.first) {
            above += weight == Weight::kOne ? 1.f : exp2_of(mass_.exponent(x));
            return;
          }
          const int place = atomicAdd(&memory_.count, 1);
          if (place < kMaxCandidates) memory_.candidates[place] = x;
          if (!(position >= range.last)) {
            smallest = fminf(smallest, x);
            largest = fmaxf(largest, x);
          }
        });
      }
      row_.publish(memory_.above, t, {warp_sum(above), 0});
    });
    const int bits[2] = {__reduce_min_sync(~0u, ordered_bits(smallest)), __reduce_max_sync(~0u, ordered_bits(largest))};
    if (lane_id() == 0) {
      atomicMin(&memory_.smallest, bits[0]);
      atomicMax(&memory_.largest, bits[1]);
    }
    Team::sync();
    const float above = row_.total(memory_.above).e;
    // Lane r of every warp asks block r.
    const int rank = min(lane_id(), Team::size() - 1);
    const bool is_block = lane_id() < Team::size();
    const int count = is_block ? *Team::of(&memory_.count, rank) : 0;
    const int end = warp_scan(count);  // of the block's candidates among those of the team
    smallest_ = from_ordered_bits(__reduce_min_sync(~0u, *Team::of(&memory_.smallest, rank)));
    largest_ = from_ordered_bits(__reduce_max_sync(~0u, *Team::of(&memory_.largest, rank)));
    count_ = __shfl_sync(~0u, end, 31);
    if (count_ <= kMaxCandidates) {
      for (int first = warp_id() * 32; first < count_; first += kThreads) {
        const int place = first + lane_id();
        int owner = 0;
#pragma unroll
        for (int r = 0; r < Team::kLargest; ++r) owner += __shfl_sync(~0u, end, r) <= place;
        owner = min(owner, Team::size() - 1);
        const int begin = __shfl_sync(~0u, end - count, owner);
        if (place < count_) memory_.sorted[place] = Team::of(memory_.candidates, owner)[place - begin];
      }
    }
    if (threadIdx.x == 0) {
      memory_.lowest = range.lowest;
      memory_.above_sum = above;
    }
    Team::sync();  // the other blocks' memory is read
    return count_ <= kMaxCandidates;
  }

  // Returns the smallest candidate for which the logits above it weigh less than the limit.
  DFLASH_INLINE float select(Weight weight, double limit) {
    if (count_ == 0) return memory_.lowest;
    sort();
    if (weight == Weight::kOne) return memory_.sorted[min(max(int(limit - memory_.above_sum), 1), count_) - 1];
    constexpr int kPerThread = kMaxCandidates / kThreads;
    double own = 0;
    const int begin = threadIdx.x * kPerThread;
    for (int i = begin; i < min(count_, begin + kPerThread); ++i) own += exp2_of(mass_.exponent(memory_.sorted[i]));
    double passed = memory_.above_sum + block_scan(own) - own;
    int place = -1;
#pragma unroll
    for (int i = begin; i < begin + kPerThread; ++i) {
      place += __syncthreads_count(i < count_ && passed < limit);
      if (i < count_) passed += exp2_of(mass_.exponent(memory_.sorted[i]));
    }
    return memory_.sorted[max(place, 0)];
  }

  // Sorts the candidates in falling order (bitonic).
  DFLASH_INLINE void sort() {
    int size = 2;
    while (size < count_) size *= 2;
    for (int i = count_ + threadIdx.x; i < size; i += kThreads) memory_.sorted[i] = -kInfinity;
    for (int run = 2; run <= size; run *= 2) {
      for (int stride = run / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < size / 2; i += kThreads) {
          const int place = 2 * i - (i & (stride - 1));
          float &a = memory_.sorted[place], &b = memory_.sorted[place + stride];
          const bool falls = (place & run) == 0;
          if (falls == (a < b)) {
            const float other = a;
            a = b;
            b = other;
          }
        }
      }
    }
    __syncthreads();
  }

  // Returns the sum over this thread and those before it. memory.warp_totals[kWarps - 1] is then the sum over all.
  DFLASH_INLINE double block_scan(double x) {
    x = warp_scan(x);
    __syncthreads();
    if (lane_id() == 31) memory_.warp_totals[warp_id()] = x;
    __syncthreads();
    if (warp_id() == 0) {
      const double total = warp_scan(lane_id() < kWarps ? memory_.warp_totals[lane_id()] : 0.0);
      if (lane_id() < kWarps) memory_.warp_totals[lane_id()] = total;
    }
    __syncthreads();
    return x + (warp_id() > 0 ? memory_.warp_totals[warp_id() - 1] : 0.0);
  }

  // Returns the k-th largest of the tiles' maxima. At least k logits are not below it.
  DFLASH_INLINE float largest_maximum(int k) {
    for (int t = threadIdx.x; t < row_.tiles(); t += kThreads) {
      const float own = row_.tile(t).best.first;
      int larger = 0;
      for (int s = 0; s < row_.tiles(); ++s) {
        const float other = row_.tile(s).best.first;
        larger += other > own || (other == own && s < t);
      }
      if (larger == k - 1) memory_.sorted[0] = own;
    }
    __syncthreads();
    const float bound = memory_.sorted[0];
    __syncthreads();
    return bound;
  }

  DFLASH_INLINE float smallest_maximum() const {
    float smallest = row_.max();
    for (int t = lane_id(); t < row_.tiles(); t += 32) {
      const float own = row_.tile(t).best.first;
      if (own > -kInfinity) smallest = fminf(smallest, own);
    }
    return from_ordered_bits(__reduce_min_sync(~0u, ordered_bits(smallest)));
  }

  const Row<Source, Team>& row_;
  PivotMemory& memory_;
  const Masses mass_;

  int count_;
  float smallest_, largest_;
};

// Applies the filters. It must follow row.read. The whole team calls this.
template <class Source, class Team>
DFLASH_INLINE void filter(Row<Source, Team>& row, const Filters<float>& filters, PivotMemory& memory) {
  if (row.is_certain() || row.is_empty()) return;
  PivotSearch<Source, Team> search(row, memory);
  const float temperature = row.temperature();
  float pivot = -kInfinity;
  bool has_few = false;
  if (filters.top_k > 0 && filters.top_k < row.vocab()) {
    pivot = search.by_count(filters.top_k) / temperature;
    has_few = filters.top_k <= kMaxCandidates / 2;
  }
  if (filters.top_p < 1) {
    if (pivot > -kInfinity) row.keep_from(pivot);
    const float kept = row.kept().e;
    // The logits below this bound together have less than 1 - top_p of the mass. The factor 0.5 allows for rounding.
    const float share = 0.5f * (1 - filters.top_p) * kept / row.vocab();
    const float bound = row.max() + temperature * logf(share);
    pivot = search.by_mass(double(filters.top_p) * kept, fmaxf(bound, row.lowest()), has_few) / temperature;
  }
  if (filters.min_p > 0) pivot = fmaxf(pivot, row.max() / temperature + logf(filters.min_p));
  if (pivot > -kInfinity && pivot != row.pivot()) row.keep_from(pivot);
}

}  // namespace dflash::DFLASH_ISA
