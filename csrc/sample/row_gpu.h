// One row of logits on a GPU: its sums, and draws from it. A team of blocks reads it, a tile of tokens per warp and
// turn. Every tile is summed by one warp in one order, and the tiles' sums are added in one order, so that a row's
// results depend neither on the size of the team nor on the other rows.
#pragma once

#include "sample/logits_gpu.h"
#include "sample/team.h"

namespace dflash::DFLASH_ISA {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kLoads = 8;  // loads of 16 bytes that a lane has in flight
constexpr int kMaxTiles = 512;

template <class T>
constexpr int kStep = 32 * kLoads * Chunk<T>::kSize;  // tokens that a warp loads at once

// The sum of e = 2^d, d = (x - the row's maximum) * rate, and the sum of e * d, over a tile or a row.
struct Sums {
  float e, e_exponent;
  DFLASH_INLINE float entropy() const { return logf(e) - kLn2 * e_exponent / e; }  // nats
};

struct Tile {
  Best best;
  float e, e_exponent;  // as Sums, but relative to the tile's own maximum
};

// Shared memory of every block of a team. What belongs to a tile is written into that of all blocks by the warp that
// reads the tile.
struct RowMemory {
  Tile tiles[kMaxTiles];
  Sums sums[kMaxTiles];  // of the tiles, before and after the filters
  Sums kept[kMaxTiles];
  float second;          // of the row, as are the totals
  Sums sum, kept_sum;
};

// Source: PlainLogits or PenalisedLogits.
template <class Source, class Team>
class Row {
  using T = typename Source::Element;
  using Values = typename Source::Values;

 public:
  static constexpr int kSize = Source::kSize;

  DFLASH_INLINE Row(const Source& logits, float temperature, RowMemory& memory)
      : logits_(logits), vocab_(logits.vocab), memory_(memory), temperature_(temperature == 0 ? 1 : temperature),
        rate_(kLog2E / temperature_),
        tile_size_((vocab_ + kStep<T> * kMaxTiles - 1) / (kStep<T> * kMaxTiles) * kStep<T>),
        tiles_((vocab_ + tile_size_ - 1) / tile_size_), share_((tiles_ + Team::size() - 1) / Team::size()) {
    Team::arrive_at_start();
    prefetch(logits_.x);
  }

  // Reads the maxima of the row, and its sums if `with_sums`. This is the one read that goes to memory. The whole team
  // calls this once.
  DFLASH_INLINE void read(bool with_sums) {
    Team::wait_for_start();
    for_each_own_tile([&](int t) { read_tile(t, with_sums); });
    Team::sync();
    Best best = Best::none();
    for (int t = lane_id(); t < tiles_; t += 32) best.merge(memory_.tiles[t].best);
    best.merge_warp();
    max_ = best.first;
    if (threadIdx.x == 0) memory_.second = best.second;
    for (int t = threadIdx.x; t < tiles_; t += kThreads) {
      const Tile& tile = memory_.tiles[t];
      const float shift = masses().exponent(tile.best.first), scale = exp2_of(shift);
      memory_.sums[t] = {scale * tile.e, scale * (tile.e_exponent + shift * tile.e)};
    }
    __syncthreads();
    const Sums sum = total(memory_.sums);
    if (threadIdx.x == 0) memory_.sum = memory_.kept_sum = sum;
    __syncthreads();
  }

  DFLASH_INLINE int vocab() const { return vocab_; }
  DFLASH_INLINE int tiles() const { return tiles_; }
  DFLASH_INLINE float temperature() const { return temperature_; }
  DFLASH_INLINE float rate() const { return rate_; }
  DFLASH_INLINE float max() const { return max_; }
  DFLASH_INLINE float second() const { return memory_.second; }
  DFLASH_INLINE bool is_certain() const { return max() == kInfinity; }  // a point mass at the argmax
  DFLASH_INLINE bool is_empty() const { return max() == -kInfinity; }   // nothing but -inf and NaN
  DFLASH_INLINE float logit(int64_t token) const { return logits_[token]; }
  DFLASH_INLINE const Sums& sums() const { return memory_.sum; }
  DFLASH_INLINE const Tile& tile(int t) const { return memory_.tiles[t]; }

  // The distribution after the filters, of which `pivot` is the smallest z = logit / temperature.
  DFLASH_INLINE const Sums& kept() const { return memory_.kept_sum; }
  DFLASH_INLINE float pivot() const { return pivot_; }  // -inf if nothing was dropped
  DFLASH_INLINE float lowest() const { return lowest_; }
  DFLASH_INLINE float normaliser() const { return max() / temperature_ + logf(kept().e); }
  DFLASH_INLINE Masses masses() const { return {lowest_, max(), rate_, 1}; }
  DFLASH_INLINE Masses probabilities() const { return {lowest_, max(), rate_, 1 / kept().e}; }

  DFLASH_INLINE const Sums* kept_by_tile() const { return pivot_ > -kInfinity ? memory_.kept : memory_.sums; }

  // Drops what is below the pivot. The whole team calls this. Between two calls the team must have synchronised.
  DFLASH_INLINE void keep_from(float pivot) {
    pivot_ = pivot;
    lowest_ = smallest_logit(pivot, temperature_);
    const Masses mass = masses();
    for_each_own_tile([&](int t) {
      float e = 0, e_exponent = 0;
      if (memory_.tiles[t].best.first >= lowest_) {
        for_each_logit(t, [&](float x) {
          const float exponent = mass.exponent(x);
          const float own = x >= lowest_ ? exp2_of(exponent) : 0.f;
          e += own;
          e_exponent += own * exponent;
        });
      }
      publish(memory_.kept, t, {warp_sum(e), warp_sum(e_exponent)});
    });
    Team::sync();
    const Sums sum = total(memory_.kept);
    if (threadIdx.x == 0) memory_.kept_sum = sum;
    __syncthreads();
  }

  // Sums any masses by tile, into sums.e. The whole team calls this. No block may still read `sums`.
  template <class Mass>
  DFLASH_INLINE Sums sum_tiles(Sums* sums, const Mass& mass) const {
    for_each_own_tile([&](int t) {
      float sum = 0;
      if (memory_.tiles[t].best.first >= lowest_) {
        for_each_batch<kLoads / 2>(t, [&](const auto& batch) {
          const auto of_chunk = mass.of(batch);
          batch.for_each([&](int c, uint32_t token, const Values& x) {
            float own[kSize];
            of_chunk(own, c, token, x);
#pragma unroll
            for (int k = 0; k < kSize; ++k) sum += own[k];
          });
        });
      }
      publish(sums, t, {warp_sum(sum), 0});
    });
    Team::sync();
    return total(sums);
  }

  // Returns the first token of the largest logit; 0 if there is none. A whole warp calls this.
  DFLASH_INLINE int argmax() const {
    if (is_empty()) return 0;
    for (int base = 0; base < tiles_; base += 32) {
      const int t = base + lane_id();
      const unsigned has = __ballot_sync(~0u, t < tiles_ && memory_.tiles[t].best.first == max());
      if (has) return first_equal(base + __ffs(has) - 1);
    }
    return 0;
  }

  struct Token {
    int id;  // -1 if there is none
    float logit;
  };

  // Inverts the CDF in the order of the vocabulary, with one number of [0, 1). The masses' sums by tile are those of
  // sum_tiles, or kept_by_tile for the filtered distribution. A whole warp calls this.
  template <class Mass>
  DFLASH_INLINE Token draw(double uniform, const Sums* sums, const Mass& mass) const {
    const int lanes_share = (tiles_ + 31) / 32;
    const int begin = min(tiles_, lane_id() * lanes_share), end = min(tiles_, begin + lanes_share);
    double own = 0;
    for (int t = begin; t < end; ++t) own += sums[t].e;
    const double passed = warp_scan(own), all = __shfl_sync(~0u, passed, 31);
    if (!(all > 0)) return {-1, 0};
    const double target = uniform * all;
    const int lane = first_or_last(own > 0 && passed > target, own > 0);
    double before = __shfl_up_sync(~0u, passed, 1);
    if (lane == 0) before = 0;
    int tile_of_target = -1;  // or the last with a mass, if the sum stays below the target because of rounding
    for (int t = begin; t < end; ++t) {
      if (!(sums[t].e > 0)) continue;
      if (tile_of_target >= 0) before += sums[tile_of_target].e;
      tile_of_target = t;
      if (before + sums[t].e > target) break;
    }
    tile_of_target = __shfl_sync(~0u, tile_of_target, lane);
    before = __shfl_sync(~0u, before, lane);
    return token_in_tile(tile_of_target, target - before, mass);
  }

  // Loads the first of this warp's tiles, in this or another row of the same vocabulary, into the L2 cache.
  DFLASH_INLINE void prefetch(const T* x) const {
    const int t = own_begin() + warp_id();
    if (t >= own_end()) return;
    const uint32_t first = t * tile_size_ + lane_id() * kSize;
#pragma unroll
    for (int c = 0; c < kLoads; ++c) {
      if (first + c * 32 * kSize < vocab_) prefetch_l2(x + first + c * 32 * kSize);
    }
  }

  // Calls f(tile) for the tiles of this warp.
  template <class F>
  DFLASH_INLINE void for_each_own_tile(F&& f) const {
    for (int t = own_begin() + warp_id(); t < own_end(); t += kWarps) f(t);
  }

  // Calls f(x) for this lane's logits in a tile; -inf past the end of the row.
  template <class F>
  DFLASH_INLINE void for_each_logit(int t, F&& f) const {
    for_each_batch<kLoads / 2>(t, [&](const auto& batch) {
      batch.for_each([&](int, uint32_t, const Values& chunk) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) f(to_float(chunk.values[k]));
      });
    });
  }

  // Writes what belongs to a tile into the memory of all blocks. A whole warp calls this; it is there after Team::sync.
  template <class S>
  DFLASH_INLINE void publish(S* by_tile, int t, const S& value) const {
    if (lane_id() < Team::size()) *Team::of(by_tile + t, lane_id()) = value;
  }

  // Every warp computes the same.
  DFLASH_INLINE Sums total(const Sums* sums) const {
    double e = 0, e_exponent = 0;
    for (int t = lane_id(); t < tiles_; t += 32) {
      e += sums[t].e;
      e_exponent += sums[t].e_exponent;
    }
    return {float(warp_sum(e)), float(warp_sum(e_exponent))};
  }

 private:
  // A batch of this lane's chunks. Chunk c holds the logits of the tokens from first + c * 32 * kSize on; past the end
  // of the row they are -inf. These were loaded at once, and lie within the row.
  template <int kChunks>
  struct LoadedBatch {
    using Values = Row::Values;
    static constexpr int kCount = kChunks;
    static constexpr bool kIsLoaded = true;
    uint32_t first;
    Values chunks[kCount];

    template <class F>
    DFLASH_INLINE void for_each(F&& f) const {
#pragma unroll
      for (int c = 0; c < kCount; ++c) f(c, first + c * 32 * kSize, chunks[c]);
    }
  };

  // These are loaded one by one: in the last tile, and in rows that are not aligned.
  template <int kChunks>
  struct Batch {
    using Values = Row::Values;
    static constexpr int kCount = kChunks;
    static constexpr bool kIsLoaded = false;
    uint32_t first;
    Source logits;

    template <class F>
    DFLASH_INLINE void for_each(F&& f) const {
#pragma unroll 1
      for (int c = 0; c < kCount; ++c) {
        const uint32_t token = first + c * 32 * kSize;
        f(c, token, logits.at(token));
      }
    }
  };

  // Calls f(batch) for the batches of this lane's chunks in a tile.
  template <int kCount, class F>
  DFLASH_INLINE void for_each_batch(int t, F&& f) const {
    constexpr int kTokens = 32 * kCount * kSize;
    const uint32_t tile_begin = t * tile_size_, tile_end = min(vocab_, tile_begin + tile_size_);
#pragma unroll 1
    for (uint32_t begin = tile_begin; begin < tile_end; begin += kTokens) {
      const uint32_t first = begin + lane_id() * kSize;
      if constexpr (Source::kIsPlain) {
        if (logits_.is_aligned && begin + kTokens <= vocab_) {
          LoadedBatch<kCount> batch{first};
#pragma unroll
          for (int c = 0; c < kCount; ++c) batch.chunks[c] = logits_.load_whole(first + c * 32 * kSize);
          f(batch);
          continue;
        }
      }
      f(Batch<kCount>{first, logits_.within(begin, begin + kTokens)});
    }
  }

  DFLASH_INLINE void read_tile(int t, bool with_sums) {
    Best best = Best::none();
    float e = 0, e_exponent = 0;
    for_each_batch<kLoads>(t, [&](const auto& batch) {
      const float before = best.first;
      BestOfChunks<Values> maxima;
      batch.for_each([&](int, uint32_t, const Values& chunk) { maxima.add(chunk); });
      best.merge(maxima.best());
      if (!with_sums) return;
      const Masses mass{-kInfinity, best.first, rate_, 1};
      const float shift = mass.exponent(before), scale = exp2_of(shift);
      e_exponent = scale * (e_exponent + shift * e);
      e *= scale;
      batch.for_each([&](int, uint32_t, const Values& chunk) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const float exponent = mass.exponent(to_float(chunk.values[k])), own = exp2_of(exponent);
          e += own;
          e_exponent += own * exponent;
        }
      });
    });
    const float lane_max = best.first;
    best.merge_warp();
    if (with_sums) {
      const float shift = Masses{0, best.first, rate_, 1}.exponent(lane_max), scale = exp2_of(shift);
      e_exponent = warp_sum(scale * (e_exponent + shift * e));
      e = warp_sum(scale * e);
    }
    publish(memory_.tiles, t, {best, e, e_exponent});
  }

  // Returns the first lane of which the first holds, or else the last of which the second holds.
  DFLASH_INLINE static int first_or_last(bool first, bool last) {
    const unsigned firsts = __ballot_sync(~0u, first), lasts = __ballot_sync(~0u, last);
    return firsts ? __ffs(firsts) - 1 : 31 - __clz(lasts);
  }

  DFLASH_INLINE int first_equal(int t) const {
    unsigned found = ~0u;
    for_each_batch<kLoads / 2>(t, [&](const auto& batch) {
      batch.for_each([&](int, uint32_t token, const Values& chunk) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (to_float(chunk.values[k]) == max()) found = min(found, token + k);
        }
      });
    });
    return __reduce_min_sync(~0u, found);
  }

  // Returns the token of a tile at which the running sum of masses exceeds the target; the last with a mass if the sum
  // stays below it because of rounding.
  template <class Mass>
  DFLASH_INLINE Token token_in_tile(int t, double target, const Mass& mass) const {
    double passed = 0;
    float rest = kInfinity;
    uint32_t place = 0;  // of the 32 chunks that hold the token
    constexpr int kCount = kLoads / 2;
    for_each_batch<kCount>(t, [&](const auto& batch) {
      const auto of_chunk = mass.of(batch);
      float sums[kCount] = {};
      batch.for_each([&](int c, uint32_t token, const Values& x) {
        float own[kSize], sum = 0;
        of_chunk(own, c, token, x);
#pragma unroll
        for (int k = 0; k < kSize; ++k) sum += own[k];
        // An index that the compiler does not know would put the sums into local memory.
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] = i == c ? sum : sums[i];
      });
#pragma unroll
      for (int c = 0; c < kCount; ++c) sums[c] = warp_sum(sums[c]);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (rest < kInfinity || !(sums[c] > 0)) continue;
        place = batch.first - lane_id() * kSize + c * 32 * kSize;
        if (passed + sums[c] > target) rest = target - passed;
        passed += sums[c];
      }
    });
    return token_in_chunks(place, rest, mass);
  }

  // The same among 32 chunks.
  template <class Mass>
  DFLASH_INLINE Token token_in_chunks(uint32_t place, float target, const Mass& mass) const {
    const Batch<1> batch{place + lane_id() * kSize, logits_};
    const Values x = logits_.at(batch.first);
    float own[kSize], sum = 0;
    mass.of(batch)(own, 0, batch.first, x);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += own[k];
    const float passed = warp_scan(sum);
    const int lane = first_or_last(sum > 0 && passed > target, sum > 0);
    float running = passed - sum;
    Token token{-1, 0};
    bool is_found = false;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      running += own[k];
      if (!is_found && own[k] > 0) token = {int(batch.first + k), to_float(x.values[k])};
      is_found = is_found || running > target;
    }
    return {__shfl_sync(~0u, token.id, lane), __shfl_sync(~0u, token.logit, lane)};
  }

  DFLASH_INLINE int own_begin() const { return min(tiles_, Team::rank() * share_); }
  DFLASH_INLINE int own_end() const { return min(tiles_, (Team::rank() + 1) * share_); }

  const Source logits_;
  const uint32_t vocab_;
  RowMemory& memory_;
  const float temperature_, rate_;
  const uint32_t tile_size_;  // tokens
  const int tiles_;           // of the row
  const int share_;           // tiles of a block

  float max_, lowest_ = -kInfinity, pivot_ = -kInfinity;
};

}  // namespace dflash::DFLASH_ISA
