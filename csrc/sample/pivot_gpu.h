// Top-k and top-p without a sort of the row, on a GPU. A histogram over the logits between two bounds says in which bin
// the pivot lies; the logits of that bin are then collected and compared with each other. Histograms count in integers,
// and sums are added in one order, so that the pivot does not depend on the order in which blocks run.
#pragma once

#include "sample/row_gpu.h"

namespace dflash::DFLASH_ISA {

constexpr int kBins = 2048;
constexpr int kMaxCandidates = kThreads;  // one for every thread

// What a logit weighs in the search of a pivot.
enum class Weight { kOne, kMass };

struct Candidate {
  float logit;
  int tile;
};

// Shared memory of every block of a team.
struct PivotMemory {
  alignas(16) uint32_t bins[kBins];
  Sums above[kMaxTiles];                 // of the logits above the candidates, by tile
  Candidate candidates[kMaxCandidates];  // of this block
  alignas(16) float logits[kMaxCandidates];  // of the team's candidates, with their tiles and weights
  alignas(16) uint32_t weights[kMaxCandidates];
  int tiles[kMaxCandidates];
  Candidate sorted[kMaxCandidates];  // of the team, in falling order
  double warp_totals[kWarps];
  int count, count_above, smallest, largest;  // of the block's candidates; the last two as ordered_bits
  int first, last;      // bins
  int kept, top_logit;  // the smallest candidate that is kept, and the largest of all, as ordered_bits
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
  DFLASH_INLINE PivotSearch(Row<Source, Team>& row, PivotMemory& memory)
      : row_(row), memory_(memory), mass_{-kInfinity, row.max(), row.rate(), 1} {}

  // A search for the smallest of the logits from `lowest` on for which those above it weigh less than `limit`.
  struct Task {
    Weight weight;
    double limit;
    float low, lowest;  // the first histogram's range ends at `low`; what is below counts if it is at least `lowest`
    float few_from;     // not more than some hundred logits should be of at least this; -inf: nothing is known
  };

  // The k-th largest logit; the search finds -inf if there are fewer.
  DFLASH_INLINE Task by_count(float k) {
    const float few_from = k <= fminf(row_.tiles(), kMaxCandidates / 2) ? largest_maximum(int(k)) : -kInfinity;
    // The last bin holds all that is below its range. Rows of normally distributed logits lie within the range.
    return {Weight::kOne, k, row_.max() - 6 * (row_.max() - smallest_maximum()), -kLargest, few_from};
  }

  DFLASH_INLINE static Task by_mass(double limit, float lowest, bool has_few) {
    return {Weight::kMass, limit, lowest, lowest, has_few ? lowest : -kInfinity};
  }

  // Searches, and drops what is below the pivot. The whole team calls this.
  DFLASH_INLINE void apply(Task task) {
    if (was_applied_) Team::sync();  // other blocks may still read what the last search left
    was_applied_ = true;
    float high = row_.max();
    double above = 0;
    constexpr int kMaxRounds = 16;
    for (int round = task.few_from > -kInfinity ? -1 : 0; round < kMaxRounds; ++round) {
      const Range range = round < 0 ? all_from(task.few_from) : narrowed(task, high, above, round);
      if (range.scale < 0) return Team::sync();  // all logits are kept
      const bool fits = collect(task.weight, range);
      if (fits) {
        // Candidates may be below what an earlier filter keeps, by a margin.
        const float pivot = fmaxf(selected(task, range) / row_.temperature(), row_.pivot());
        row_.keep(pivot, memory_.above, [&](int t, float lowest) { return candidates_of(t, lowest); });
      }
      Team::wait();
      if (fits) return;
      if (round < 0) continue;
      task.low = task.lowest = smallest_;
      high = largest_;
      above = task.weight == Weight::kOne ? count_above_ : row_.total(memory_.above).e;
      if (task.low == high) break;
    }
    row_.keep_from(task.low / row_.temperature());
  }

 private:
  static constexpr float kLargest = 3.402823466e38f;
  static constexpr float kUnit = 1 << 22;  // of candidates' weights, so that 512 of them fit into 32 bits

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

  // Returns the bins in which the pivot may lie.
  DFLASH_INLINE Range narrowed(const Task& task, float high, double above, int round) {
    const bool counts = task.weight == Weight::kOne;
    const float low = task.low, lowest = task.lowest;
    const float scale = fminf(kBins / fminf(high - low, kLargest), kLargest);
    const float bin_exponent = row_.rate() / scale, high_exponent = mass_.exponent(high);
    // The weights of a bin add up to less than 2^32.
    const float unit = counts ? 1.f : float(1 << min(20, __clz(row_.vocab())));
    Range range{high, scale, 0, lowest, 0};

    for (int b = threadIdx.x; b < kBins; b += kThreads) memory_.bins[b] = 0;
    if (threadIdx.x == 0) memory_.first = memory_.last = 0;
    __syncthreads();
    row_.for_each_own_tile([&](int t) {
      if (row_.tile(t).best.first < lowest) return;
      row_.for_each_logit(t, [&](float x) {
        if (!(x >= lowest && x <= high)) return;
        const float position = range.position(x);
        // Adding 2^23 leaves the integer in the low bits.
        const float shifted = __fadd_rz(fminf(position, kBins - 1), 0x1p23f), bin = shifted - 0x1p23f;
        // The mass relative to that of the upper edge of the bin.
        const float own = counts ? 1.f : exp2_of((bin - position) * bin_exponent) * unit;
        atomicAdd(&memory_.bins[__float_as_int(shifted) & (kBins - 1)], __float_as_int(own + 0x1p23f) & 0x7fffff);
      });
    });
    Team::sync();
    constexpr int kPerThread = kBins / kThreads;
    static_assert(kPerThread == 4);
    constexpr int kTogether = Source::kIsPlain || Team::kLargest == 1 ? Team::kLargest : Team::kLargest / 2;
    uint32_t bins[kPerThread] = {};
#pragma unroll
    for (int first = 0; first < Team::kLargest; first += kTogether) {
      uint4 by_block[kTogether];  // loaded at once
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int rank = min(first + r, Team::size() - 1);
        by_block[r] = reinterpret_cast<const uint4*>(Team::of(memory_.bins, rank))[threadIdx.x];
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        if (first + r >= Team::size()) break;
        bins[0] += by_block[r].x, bins[1] += by_block[r].y, bins[2] += by_block[r].z, bins[3] += by_block[r].w;
      }
    }
    double weights[kPerThread], own = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int bin = threadIdx.x * kPerThread + i;
      const float edge = high_exponent - bin * bin_exponent;
      weights[i] = counts ? double(bins[i]) : double(float(bins[i]) / unit * exp2_of(edge));
      own += weights[i];
    }
    double passed = block_scan(own) - own;
    const double all = above + all_;
    // Rounded masses are within this of the true ones. It is 0 at last, so that every round narrows the range.
    const double tolerance = counts || round >= 4 ? 0 : 1.0 / unit + 1e-6;
    int own_first = 0, own_last = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      own_last += above + passed * (1 - tolerance) < task.limit;
      passed += weights[i];
      own_first += above + passed * (1 + tolerance) < task.limit;
    }
    own_first = __reduce_add_sync(~0u, own_first);
    own_last = __reduce_add_sync(~0u, own_last);
    if (lane_id() == 0 && own_first > 0) atomicAdd(&memory_.first, own_first);
    if (lane_id() == 0 && own_last > 0) atomicAdd(&memory_.last, own_last);
    __syncthreads();
    if (counts && all < task.limit) range.scale = -1;
    const int first = min(memory_.first, kBins - 1), last = max(min(memory_.last - 1, kBins - 1), first);
    range.first = first;
    range.last = last == kBins - 1 ? __int_as_float(0x7fffffff) : last + 1.f;
    range.lowest = margin_below(last == kBins - 1 ? lowest : fmaxf(lowest, high - range.last / scale), high);
    return range;
  }

  // Collects the candidates of the team, and the sums of what is above them. Returns whether they fit; if they do not,
  // smallest_ and largest_ are their bounds. The team has then arrived, and must wait before the next search.
  DFLASH_INLINE bool collect(Weight weight, const Range& range) {
    if (threadIdx.x == 0) {
      memory_.count = memory_.count_above = 0;
      memory_.smallest = ordered_bits(kInfinity);
      memory_.largest = memory_.top_logit = ordered_bits(-kInfinity);
      memory_.kept = ordered_bits(kInfinity);
    }
    __syncthreads();
    float smallest = kInfinity, largest = -kInfinity;
    int count_above = 0;
    row_.for_each_own_tile([&](int t) {
      Sums above{0, 0};
      if (row_.tile(t).best.first >= range.lowest) {
        row_.for_each_logit(t, [&](float x) {
          if (!(x >= range.lowest)) return;
          const float position = range.position(x);
          if (position < range.first) {
            const float exponent = mass_.exponent(x), own = exp2_of(exponent);
            above.e += own;
            above.e_exponent += own * exponent;
            ++count_above;
            return;
          }
          const int place = atomicAdd(&memory_.count, 1);
          if (place < kMaxCandidates) memory_.candidates[place] = {x, t};
          if (!(position >= range.last)) {
            smallest = fminf(smallest, x);
            largest = fmaxf(largest, x);
          }
        });
      }
      row_.publish(memory_.above, t, {warp_sum(above.e), warp_sum(above.e_exponent)});
    });
    const int bits[2] = {__reduce_min_sync(~0u, ordered_bits(smallest)),
                         __reduce_max_sync(~0u, ordered_bits(largest))};
    count_above = __reduce_add_sync(~0u, count_above);
    if (lane_id() == 0) {
      atomicMin(&memory_.smallest, bits[0]);
      atomicMax(&memory_.largest, bits[1]);
      atomicAdd(&memory_.count_above, count_above);
    }
    Team::sync();
    // Lane r of every warp asks block r.
    const int rank = min(lane_id(), Team::size() - 1);
    const bool is_block = lane_id() < Team::size();
    const PivotMemory& other = *Team::of(&memory_, rank);
    const int count = is_block ? other.count : 0;
    count_above_ = __reduce_add_sync(~0u, is_block ? other.count_above : 0);
    smallest_ = from_ordered_bits(__reduce_min_sync(~0u, other.smallest));
    const int largest_bits = __reduce_max_sync(~0u, other.largest);
    largest_ = from_ordered_bits(largest_bits);
    const int end = warp_scan(count);  // of the block's candidates among those of the team
    count_ = __shfl_sync(~0u, end, 31);
    if (count_ <= kMaxCandidates && warp_id() * 32 < count_) {
      const int place = threadIdx.x;
      int owner = 0;
#pragma unroll
      for (int r = 0; r < Team::kLargest; ++r) owner += __shfl_sync(~0u, end, r) <= place;
      owner = min(owner, Team::size() - 1);
      const int begin = __shfl_sync(~0u, end - count, owner);
      Candidate own{-kInfinity, 0};
      if (place < count_) own = Team::of(memory_.candidates, owner)[place - begin];
      memory_.logits[place] = own.logit;
      memory_.tiles[place] = own.tile;
      // Masses are relative to that of the largest logit in the range, or above it.
      const float exponent = fmaxf((own.logit - top(range)) * row_.rate(), -1e4f);
      memory_.weights[place] = weight == Weight::kOne ? 1 : __float2uint_rn(kUnit * exp2_of(exponent));
    }
    Team::arrive();
    __syncthreads();
    return count_ <= kMaxCandidates;
  }

  // No candidate is above this.
  DFLASH_INLINE static float top(const Range& range) {
    return range.first > 0 ? range.high - (range.first - 0.5f) / range.scale : range.high;
  }

  // Returns the smallest candidate for which the logits above it weigh less than the limit; the largest if there is
  // none.
  DFLASH_INLINE float selected(const Task& task, const Range& range) {
    if (count_ == 0) return range.lowest;
    const double above = task.weight == Weight::kOne ? count_above_ : row_.total(memory_.above).e;
    const double unit = task.weight == Weight::kOne ? 1 : exp2_of(mass_.exponent(top(range))) / kUnit;
    int kept = ordered_bits(kInfinity), largest = ordered_bits(-kInfinity);
    const int place = threadIdx.x;
    if (warp_id() * 32 < count_) {
      const float own = memory_.logits[place];
      uint32_t weight = 0;
      int before = 0;  // in falling order
      for (int i = 0; i < count_; i += 4) {
        const float4 logits = *reinterpret_cast<const float4*>(memory_.logits + i);
        const uint4 weights = *reinterpret_cast<const uint4*>(memory_.weights + i);
        const auto compare = [&](float other, uint32_t other_weight, int other_place) {
          weight += other > own ? other_weight : 0;
          before += other > own || (other == own && other_place < place);
        };
        compare(logits.x, weights.x, i);
        compare(logits.y, weights.y, i + 1);
        compare(logits.z, weights.z, i + 2);
        compare(logits.w, weights.w, i + 3);
      }
      if (place < count_) {
        memory_.sorted[before] = {own, memory_.tiles[place]};
        largest = ordered_bits(own);
        if (above + weight * unit < task.limit) kept = largest;
      }
    }
    kept = __reduce_min_sync(~0u, kept);
    largest = __reduce_max_sync(~0u, largest);
    if (lane_id() == 0) {
      atomicMin(&memory_.kept, kept);
      atomicMax(&memory_.top_logit, largest);
    }
    __syncthreads();
    return from_ordered_bits(min(memory_.kept, memory_.top_logit));
  }

  // Returns the sums of a tile's candidates of at least `lowest`. They are added in falling order, and do not depend on
  // the order in which they were found.
  DFLASH_INLINE Sums candidates_of(int t, float lowest) const {
    Sums sums{0, 0};
    for (int i = 0; i < count_; ++i) {
      const Candidate candidate = memory_.sorted[i];
      if (candidate.logit < lowest) break;
      if (candidate.tile != t) continue;
      const float exponent = mass_.exponent(candidate.logit), e = exp2_of(exponent);
      sums.e += e;
      sums.e_exponent += e * exponent;
    }
    return sums;
  }

  // Returns the sum over this thread and those before it. all_ is then the sum over all.
  DFLASH_INLINE double block_scan(double x) {
    x = warp_scan(x);
    if (lane_id() == 31) memory_.warp_totals[warp_id()] = x;
    __syncthreads();
    const double totals = warp_scan(lane_id() < kWarps ? memory_.warp_totals[lane_id()] : 0.0);
    all_ = __shfl_sync(~0u, totals, 31);
    return warp_id() > 0 ? x + __shfl_sync(~0u, totals, max(warp_id() - 1, 0)) : x;
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
      if (larger == k - 1) memory_.logits[0] = own;
    }
    __syncthreads();
    const float bound = memory_.logits[0];
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

  Row<Source, Team>& row_;
  PivotMemory& memory_;
  const Masses mass_;

  bool was_applied_ = false;
  int count_, count_above_;
  float smallest_, largest_;
  double all_;
};

// Applies the filters. It must follow row.read. The whole team calls this.
template <class Source, class Team>
DFLASH_INLINE void filter(Row<Source, Team>& row, const Filters<float>& filters, PivotMemory& memory) {
  if (row.is_certain() || row.is_empty()) return;
  PivotSearch<Source, Team> search(row, memory);
  const bool has_top_k = filters.top_k > 0 && filters.top_k < row.vocab();
  // Two rounds of a loop make one copy of the code.
#pragma unroll 1
  for (int step = 0; step < 2; ++step) {
    const Weight weight = step == 0 ? Weight::kOne : Weight::kMass;
    if (weight == Weight::kOne ? !has_top_k : !(filters.top_p < 1)) continue;
    typename PivotSearch<Source, Team>::Task task;
    if (weight == Weight::kOne) {
      task = search.by_count(filters.top_k);
    } else {
      const float kept = row.kept().e;
      // The logits below this bound together have less than 1 - top_p of the mass. The factor 0.5 allows for rounding.
      const float share = 0.5f * (1 - filters.top_p) * kept / row.vocab();
      const float bound = row.max() + row.temperature() * logf(share);
      const bool has_few = has_top_k && filters.top_k <= kMaxCandidates / 2;
      task = search.by_mass(double(filters.top_p) * kept, fmaxf(bound, row.lowest()), has_few);
    }
    search.apply(task);
  }
  if (filters.min_p > 0) {
    const float pivot = row.max() / row.temperature() + logf(filters.min_p);
    if (pivot > row.pivot()) {
      Team::sync();  // other blocks may still use what the searches left
      row.keep_from(pivot);
    }
  }
}

}  // namespace dflash::DFLASH_ISA
