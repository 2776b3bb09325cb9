// Top-k and top-p without a sort, on a GPU. A histogram over the logits between two bounds says in which bin the pivot
// lies; the logits of that bin are then collected in the shared memory of all blocks, and searched. Masses are added as
// integers, or in one order, so that the pivot does not depend on the order in which blocks run.
//
// The passes over the row have no branch at a logit: a warp would wait there for every single one of its logits.
#pragma once

#include "sample/number_bins.h"
#include "sample/row_gpu.h"

namespace dflash::DFLASH_ISA {

constexpr int kMaxCandidates = 2048;

struct PivotMemory {
  uint32_t bins[kBins + 32];         // the last are for logits outside of the range; a branch would cost more
  float above[kMaxTiles];            // the weights of the logits above the candidates
  float candidates[kMaxCandidates];  // those of block r begin at r * kMaxCandidates / Team::size()
  int counts[8], smallest[8], largest[8];  // of each block's candidates; the last two as ordered_bits
  int bits[kMaxCandidates];          // of all candidates, as ordered_bits
  float masses[kMaxCandidates];      // of the same candidates
  uint64_t heavier[2][kWarps];
  double warp_totals[kWarps];
  int first_bin, last_bin;
  float bound;
  int count, least, most;  // as counts, smallest and largest, of this block
};

// What top-k or top-p searches.
struct Wanted {
  bool by_mass;       // the weight of a logit is its mass; otherwise 1
  float p_or_k;       // the logits above the pivot weigh less than k, or than the share p of all
  bool has_few;       // few logits are expected to reach `bound`
  float bound;        // the pivot is not below it
  float low, lowest;  // the histogram covers [low, max]; its last bin has the logits from `lowest` on as well
};

// The smallest logit that a filter keeps.
struct Pivot {
  float logit;
  float kept = 0;  // the mass of the logits from it on; 0 if it is not known
};

template <class Source, class Team>
class PivotSearch {
 public:
  DFLASH_INLINE PivotSearch(const Row<Source, Team>& row, PivotMemory& memory)
      : row_(row), memory_(memory), mass_{-kInfinity, row.max(), row.rate(), 1} {}

  DFLASH_INLINE Wanted top_k(float k) const {
    // At least k logits are not below the k-th largest of the tiles' maxima.
    const float bound = k <= row_.tiles() ? largest_maximum(int(k)) : -kInfinity;
    // The last bin holds all that is below its range. Rows of normally distributed logits lie within the range.
    const float spread = row_.max() - smallest_maximum();
    return {false, k, bound > -kInfinity, bound, row_.max() - 6 * spread, -kLargest};
  }

  DFLASH_INLINE Wanted top_p(float p, bool has_few) const {
    // The logits below this bound together have less than 1 - p of the mass. The factor 0.5 allows for rounding.
    const float share = 0.5f * (1 - p) * row_.kept() / row_.vocab();
    const float bound = fmaxf(row_.max() + row_.temperature() * logf(share), row_.lowest());
    return {true, p, has_few, bound, bound, bound};
  }

  // Returns the smallest logit for which those above it weigh less than the limit; -inf if all together do. The whole
  // team calls this. Between two calls the team must have synchronised.
  DFLASH_INLINE Pivot find(Wanted wanted) {
    constexpr int kMaxRounds = 16;
    if constexpr (kHasNumberBins) {
      Pivot pivot;
      if (finds_number(wanted, pivot)) return pivot;
    }
    float high = row_.max();
    above_ = 0;
    Range range{high, 0, 0, margin_below(wanted.bound, high), 1};
#pragma unroll 1
    for (int round = 0; round < kMaxRounds; ++round) {
      if (!wanted.has_few) range = narrowed(wanted, high, round);
      if (range.scale < 0) return {-kInfinity};
      if (collect(wanted.by_mass, range)) return {selected(wanted, range)};
      if (wanted.has_few) {
        wanted.has_few = false;
        above_ = 0;
        continue;
      }
      const int block = min(lane_id(), Team::size() - 1);
      wanted.low = wanted.lowest = from_ordered_bits(__reduce_min_sync(~0u, memory_.smallest[block]));
      high = from_ordered_bits(__reduce_max_sync(~0u, memory_.largest[block]));
      if (wanted.low == high) break;
    }
    return {wanted.low};
  }

 private:
  using Values = typename Source::Values;
  using Number = std::remove_cvref_t<decltype(Values{}.values[0])>;
  static constexpr bool kHasNumberBins = sizeof(Number) == 2;
  static constexpr int kPerThread = kBins / kThreads;
  static_assert(kPerThread == 2);
  static constexpr float kLargest = 3.402823466e38f;
  static constexpr float kUnit = 0x1p20f;
  static constexpr float kMagic = 8388608;  // 2^23: floats from here on are integers

  // Candidates are the logits of at least `lowest` whose position is not before `first`.
  struct Range {
    float high, scale;  // the position of a logit x is (high - x) * scale; scale < 0: no logit is the pivot
    float first, lowest;
    float last;  // the end of the positions of which the bounds are taken; NaN: there is none

    DFLASH_INLINE float position(float x) const { return (high - x) * scale; }
  };

  DFLASH_INLINE double limit_of(const Wanted& wanted) const {
    return wanted.by_mass ? double(wanted.p_or_k) * row_.kept() : wanted.p_or_k;
  }

  // A number below x by more than smallest_logit may go.
  DFLASH_INLINE static float margin_below(float x, float high) {
    return fmaxf(x - 0x1p-20f * fmaxf(fabsf(x), fabsf(high)), -kLargest);
  }

  // Counts the logits of every number that 16 bits can hold between the bounds. Returns whether that says which of them
  // is the pivot. The team has synchronised.
  DFLASH_INLINE bool finds_number(const Wanted& wanted, Pivot& pivot) {
    const float low = wanted.bound > -kInfinity ? wanted.bound : wanted.low;
    const NumberBins<Number> numbers(low, row_.max());
    if (!numbers.fits()) return false;
    const uint32_t count = numbers.count();
    const float lowest = numbers.number_of(count - 1);
    clear_bins();
    row_.for_each_own_tile([&](int t) {
      row_.for_each_chunk_from(lowest, t, [&](const auto& chunk) {
#pragma unroll
        for (int k = 0; k < Values::kSize; ++k) {
          const uint32_t bin = numbers.bin_of(chunk.values[k]);
          atomicAdd(memory_.bins + (bin < count ? bin : kBins + lane_id()), 1);
        }
      });
    });
    Team::sync();
    uint32_t counts[kPerThread];
    add_bins(counts, count);
    double masses[kPerThread], weights[kPerThread], all;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float number = numbers.number_of(threadIdx.x * kPerThread + i);
      masses[i] = counts[i] > 0 ? double(counts[i]) * exp2_of(mass_.exponent(number)) : 0;
      weights[i] = wanted.by_mass ? masses[i] : counts[i];
    }
    const double limit = limit_of(wanted);
    double passed = block_scan(weights[0] + weights[1], all) - weights[0] - weights[1];
    int last = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (passed < limit) last = threadIdx.x * kPerThread + i;
      passed += weights[i];
    }
    last = __reduce_max_sync(~0u, last);
    if (lane_id() == 0) atomicMax(&memory_.last_bin, last);
    __syncthreads();
    last = memory_.last_bin;
    const bool is_found = all >= limit && numbers.is_exact(last);
    double own_kept = 0, kept;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) own_kept += int(threadIdx.x) * kPerThread + i <= last ? masses[i] : 0;
    block_scan(own_kept, kept);
    pivot.logit = numbers.number_of(last);
    // A very high temperature makes neighbours equal, which are all kept.
    const bool is_alone = numbers.number_of(last + 1) / row_.temperature() < pivot.logit / row_.temperature();
    pivot.kept = is_alone && numbers.is_exact(last + 1) ? float(kept) : 0;
    Team::sync();
    return is_found;
  }

  DFLASH_INLINE void clear_bins() {
    for (int b = threadIdx.x; b < kBins; b += kThreads) memory_.bins[b] = 0;
    if (threadIdx.x == 0) {
      memory_.first_bin = kBins - 1;
      memory_.last_bin = 0;
    }
    __syncthreads();
  }

  // Adds up this thread's bins over the blocks of the team, if they are of the first `count`.
  DFLASH_INLINE void add_bins(uint32_t (&counts)[kPerThread], int count) const {
    counts[0] = counts[1] = 0;
    if (int(threadIdx.x) * kPerThread >= count) return;
    uint2 by_block[Team::kLargest];  // loaded at once
#pragma unroll
    for (int r = 0; r < Team::kLargest; ++r) {
      by_block[r] = reinterpret_cast<const uint2*>(Team::of(memory_.bins, min(r, Team::size() - 1)))[threadIdx.x];
    }
#pragma unroll
    for (int r = 0; r < Team::kLargest; ++r) {
      counts[0] += r < Team::size() ? by_block[r].x : 0;
      counts[1] += r < Team::size() ? by_block[r].y : 0;
    }
  }

  // Returns the bins in which the pivot may lie.
  DFLASH_INLINE Range narrowed(const Wanted& wanted, float high, int round) {
    const float low = wanted.low, lowest = wanted.lowest;
    const double above = above_, limit = limit_of(wanted);
    const float scale = fminf(kBins / fminf(high - low, kLargest), kLargest);
    const float bin_exponent = row_.rate() / scale, high_exponent = mass_.exponent(high);
    // The weights of a bin add up to less than 2^32.
    const int bits = min(20, __clz(row_.vocab()));
    const float unit = wanted.by_mass ? float(1 << bits) : 1.f;
    Range range{high, scale, 0, lowest, 0};

    clear_bins();
    row_.for_each_own_tile([&](int t) {
      row_.for_each_chunk_from(lowest, t, [&](const auto& chunk) {
#pragma unroll
        for (int k = 0; k < Values::kSize; ++k) {
          const float x = to_float(chunk.values[k]), position = fminf(range.position(x), kBins - 0.01f);
          // Sums with 2^23 are rounded to integers, which their lower bits are. Conversions would be slower.
          const float floor = __fadd_rd(position, kMagic);
          const float mass = exp2_of((floor - kMagic - position) * bin_exponent);  // relative to the bin's upper edge
          const uint32_t own = wanted.by_mass ? __float_as_uint(fmaf(mass, unit, kMagic)) & 0x7fffff : 1;
          const bool is_within = x >= lowest && x <= high;
          atomicAdd(memory_.bins + (is_within ? __float_as_uint(floor) & (kBins - 1) : kBins + lane_id()), own);
        }
      });
    });
    Team::sync();
    uint32_t counts[kPerThread];
    add_bins(counts, kBins);
    double weights[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float edge = exp2_of(high_exponent - (threadIdx.x * kPerThread + i) * bin_exponent);
      weights[i] = wanted.by_mass ? double(float(counts[i]) / unit * edge) : double(counts[i]);
    }
    double all;
    double passed = above + block_scan(weights[0] + weights[1], all) - weights[0] - weights[1];
    // Rounded masses are within this of the true ones. It is 0 at last, so that every round narrows the range.
    const double tolerance = !wanted.by_mass || round >= 4 ? 0 : 1.0 / unit + 1e-6;
    int first = kBins - 1, last = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int bin = threadIdx.x * kPerThread + i;
      if (above + (passed - above) * (1 - tolerance) < limit) last = bin;
      passed += weights[i];
      if (!(above + (passed - above) * (1 + tolerance) < limit)) first = min(first, bin);
    }
    first = __reduce_min_sync(~0u, first);
    last = __reduce_max_sync(~0u, last);
    if (lane_id() == 0) {
      atomicMin(&memory_.first_bin, first);
      atomicMax(&memory_.last_bin, last);
    }
    __syncthreads();
    first = memory_.first_bin;
    last = max(memory_.last_bin, first);
    if (!wanted.by_mass && above + all < limit) range.scale = -1;
    range.first = first;
    range.last = last == kBins - 1 ? __int_as_float(0x7fffffff) : last + 1.f;
    range.lowest = margin_below(last == kBins - 1 ? lowest : fmaxf(lowest, high - range.last / scale), high);
    return range;
  }

  // Brings the candidates of the team into every block, and finds the weight above them. Returns whether they fit; if
  // they do not, memory.smallest and memory.largest are their bounds.
  DFLASH_INLINE bool collect(bool by_mass, const Range& range) {
    const int capacity = kMaxCandidates / Team::size();
    float* const own_candidates = memory_.candidates + Team::rank() * capacity;
    if (threadIdx.x == 0) {
      memory_.count = 0;
      memory_.least = ordered_bits(kInfinity);
      memory_.most = ordered_bits(-kInfinity);
    }
    __syncthreads();
    row_.for_each_own_tile([&](int t) {
      float above = 0;
      row_.for_each_chunk_from(range.lowest, t, [&](const auto& chunk) {
        constexpr int kSize = Row<Source, Team>::kSize;
        unsigned candidates = 0;
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const float x = to_float(chunk.values[k]), mass = exp2_of(mass_.exponent(x));
          const bool is_before = range.position(x) < range.first;
          if (x >= range.lowest && is_before) above += by_mass ? mass : 1.f;
          if (x >= range.lowest && !is_before) candidates |= 1u << k;
        }
        if (candidates == 0) return;  // as in most chunks
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if ((candidates >> k & 1) == 0) continue;
          const float x = to_float(chunk.values[k]);
          const int place = atomicAdd(&memory_.count, 1);
          if (place < capacity) own_candidates[place] = x;
          if (!(range.position(x) >= range.last)) {
            atomicMin(&memory_.least, ordered_bits(x));
            atomicMax(&memory_.most, ordered_bits(x));
          }
        }
      });
      row_.publish(memory_.above, t, warp_sum(above));
    });
    __syncthreads();
    // A warp writes to one block.
    for (int r = warp_id(); r < Team::size(); r += kWarps) {
      if (lane_id() == 0) {
        *Team::of(memory_.counts + Team::rank(), r) = memory_.count;
        *Team::of(memory_.smallest + Team::rank(), r) = memory_.least;
        *Team::of(memory_.largest + Team::rank(), r) = memory_.most;
      }
      if (r == Team::rank()) continue;
      float* const out = Team::of(own_candidates, r);
      for (int i = lane_id(); i < min(memory_.count, capacity); i += 32) out[i] = own_candidates[i];
    }
    Team::sync();
    above_ = row_.total([this](int t) { return memory_.above[t]; });
    return __all_sync(~0u, memory_.counts[min(lane_id(), Team::size() - 1)] <= capacity);
  }

  // Returns the smallest candidate for which the logits above it weigh less than the limit. Each warp tries a number,
  // which leaves a sixteenth of the range in which the pivot's bits lie.
  DFLASH_INLINE float selected(const Wanted& wanted, const Range& range) {
    const int capacity = kMaxCandidates / Team::size();
    const int own_count = lane_id() < Team::size() ? memory_.counts[lane_id()] : 0;
    const int end = warp_scan(own_count), count = __shfl_sync(~0u, end, 31);
    if (count == 0) return range.lowest;
    int low = ordered_bits(kInfinity), high = ordered_bits(-kInfinity);
    for (int r = 0; r < Team::size(); ++r) {
      const int begin = __shfl_sync(~0u, end - own_count, r), of_block = __shfl_sync(~0u, own_count, r);
      for (int i = threadIdx.x; i < of_block; i += kThreads) {
        const float x = memory_.candidates[r * capacity + i];
        memory_.bits[begin + i] = ordered_bits(x);
        memory_.masses[begin + i] = exp2_of(mass_.exponent(x)) * kUnit;
        low = min(low, ordered_bits(x));
        high = max(high, ordered_bits(x));
      }
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane_id() == 0) {
      atomicMin(&memory_.least, low);
      atomicMax(&memory_.most, high);
    }
    __syncthreads();
    low = memory_.least;
    high = memory_.most;
    // Weights are integers: numbers of logits, or masses in units of 2^-40, of which both halves are added alone.
    const double unit = wanted.by_mass ? double(kUnit) * kUnit : 1.0;
    const uint64_t limit = fmin(fmax((limit_of(wanted) - double(above_)) * unit, 1.0), 0x1p60);
#pragma unroll 1
    for (int turn = 0; low < high; ++turn) {
      const uint32_t step = (uint32_t(high) - uint32_t(low) - 1) / kWarps + 1;
      const int tried = low + int(step * warp_id());
      uint32_t sum_high = 0, sum_low = 0;
#pragma unroll 4
      for (int i = lane_id(); i < count; i += 32) {
        const float mass = memory_.masses[i], whole = floorf(mass);
        const bool is_above = memory_.bits[i] > tried;
        sum_high += is_above && wanted.by_mass ? __float2uint_rz(whole) : 0;
        sum_low += !is_above ? 0 : wanted.by_mass ? __float2uint_rz((mass - whole) * kUnit) : 1;
      }
      const uint64_t sum = __reduce_add_sync(~0u, sum_low) + uint64_t(kUnit) * __reduce_add_sync(~0u, sum_high);
      if (lane_id() == 0) memory_.heavier[turn % 2][warp_id()] = sum;
      __syncthreads();
      // The pivot is the first number above which there is less than the limit.
      const bool is_light = lane_id() >= kWarps || memory_.heavier[turn % 2][lane_id()] < limit;
      const int first = __ffs(__ballot_sync(~0u, is_light)) - 1;
      if (first < kWarps) high = min(high, low + int(step * first));
      if (first > 0) low += int(step * (first - 1)) + 1;
    }
    return from_ordered_bits(low);
  }

  // Returns the sum over this thread and those before it.
  DFLASH_INLINE double block_scan(double x, double& all) {
    x = warp_scan(x);
    if (lane_id() == 31) memory_.warp_totals[warp_id()] = x;
    __syncthreads();
    const double before = warp_scan(lane_id() < kWarps ? memory_.warp_totals[lane_id()] : 0.0);
    all = __shfl_sync(~0u, before, 31);
    const double own = __shfl_sync(~0u, before, max(warp_id() - 1, 0));
    return x + (warp_id() > 0 ? own : 0.0);
  }

  // Returns the k-th largest of the tiles' maxima. A warp counts how many are larger than its own.
  DFLASH_INLINE float largest_maximum(int k) const {
    const auto maximum = [this](int t) { return row_.tile(t).best.first; };
    for (int t = warp_id(); t < row_.tiles(); t += kWarps) {
      const float own = row_.tile(t).best.first;
      int larger = 0;
      for_each_tile<32>(lane_id(), row_.tiles(), maximum, [&](int s, float other) {
        larger += other > own || (other == own && s < t);
      });
      if (__reduce_add_sync(~0u, larger) == k - 1 && lane_id() == 0) memory_.bound = own;
    }
    __syncthreads();
    return memory_.bound;
  }

  DFLASH_INLINE float smallest_maximum() const {
    float smallest = row_.max();
    for_each_tile<32>(lane_id(), row_.tiles(), [this](int t) { return row_.tile(t).best.first; },
                           [&](int, float own) { smallest = own > -kInfinity ? fminf(smallest, own) : smallest; });
    return warp_min(smallest);
  }

  const Row<Source, Team>& row_;
  PivotMemory& memory_;
  const Masses mass_;

  float above_;  // the weight of the logits above the candidates
};

// Applies the filters. It must follow row.read, and row.sum_kept may have to follow it. The whole team calls this.
template <class Source, class Team>
DFLASH_INLINE void filter(Row<Source, Team>& row, const Filters<float>& filters, PivotMemory& memory) {
  const bool by_count = filters.top_k > 0 && filters.top_k < row.vocab();
  if (!by_count && !(filters.top_p < 1) && !(filters.min_p > 0)) return;
  if (row.is_certain() || row.is_empty()) return;
  PivotSearch<Source, Team> search(row, memory);
  float pivot = -kInfinity;
#pragma unroll 1
  for (int by_mass = 0; by_mass < 2; ++by_mass) {
    float kept = 0;
    if (by_mass ? filters.top_p < 1 : by_count) {
      const bool has_few = by_count && filters.top_k <= kMaxCandidates / 2;
      const Wanted wanted = by_mass ? search.top_p(filters.top_p, has_few) : search.top_k(filters.top_k);
      const Pivot found = search.find(wanted);
      pivot = found.logit / row.temperature();
      kept = found.kept;
    }
    if (by_mass && filters.min_p > 0) {
      const float of_min_p = row.max() / row.temperature() + logf(filters.min_p);
      if (of_min_p > pivot) kept = 0;
      pivot = fmaxf(pivot, of_min_p);
    }
    if (pivot > row.pivot()) {
      row.keep_from(pivot, kept);
    } else if (!by_mass && by_count) {
      Team::sync();  // as there, between two searches
    }
  }
}

}  // namespace dflash::DFLASH_ISA
