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

// Shared memory of every block of a team. A block writes what belongs to its own tiles, and copies the rest.
struct RowMemory {
  Tile tiles[kMaxTiles];
  Sums kept[kMaxTiles];  // the sums after the filters
  float second;          // of the row, as the totals
  Sums sum, kept_sum;
};

template <class T, class Team>
class Row {
 public:
  static constexpr int kSize = Chunk<T>::kSize;

  DFLASH_INLINE Row(const T* x, int64_t vocab, float temperature, RowMemory& memory)
      : x_(x), vocab_(vocab), aligned_(is_aligned(x)), memory_(memory), temperature_(temperature == 0 ? 1 : temperature),
        rate_(kLog2E / temperature_),
        tile_size_((vocab_ + kStep<T> * kMaxTiles - 1) / (kStep<T> * kMaxTiles) * kStep<T>),
        tiles_((vocab_ + tile_size_ - 1) / tile_size_), share_((tiles_ + Team::size() - 1) / Team::size()) {}

  // Reads the maxima of the row, and its sums if `with_sums`. This is the one read that goes to memory.
  DFLASH_INLINE void read(bool with_sums) {
    for (int t = own_begin() + warp_id(); t < own_end(); t += kWarps) read_tile(t, with_sums);
    exchange(memory_.tiles);
    Best best;
    for (int t = lane_id(); t < tiles_; t += 32) best.merge(memory_.tiles[t].best);
    best.merge_warp();
    max_ = best.first;
    for (int t = threadIdx.x; t < tiles_; t += kThreads) {
      const Tile& tile = memory_.tiles[t];
      const float shift = masses().exponent(tile.best.first), scale = exp2_of(shift);
      memory_.kept[t] = {scale * tile.e, scale * (tile.e_exponent + shift * tile.e)};
    }
    __syncthreads();
    const Sums sum = total(memory_.kept);
    if (threadIdx.x == 0) {
      memory_.second = best.second;
      memory_.sum = memory_.kept_sum = sum;
    }
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
  DFLASH_INLINE float logit(int64_t token) const { return to_float(x_[token]); }
  DFLASH_INLINE const Sums& sums() const { return memory_.sum; }
  DFLASH_INLINE const Tile& tile(int t) const { return memory_.tiles[t]; }

  // The distribution after the filters, of which `pivot` is the smallest z = logit / temperature.
  DFLASH_INLINE const Sums& kept() const { return memory_.kept_sum; }
  DFLASH_INLINE float pivot() const { return pivot_; }  // -inf if nothing was dropped
  DFLASH_INLINE float lowest() const { return lowest_; }
  DFLASH_INLINE float normaliser() const { return max() / temperature_ + logf(kept().e); }
  DFLASH_INLINE Masses<T> masses() const { return {lowest_, max(), rate_, 1}; }
  DFLASH_INLINE Masses<T> probabilities() const { return {lowest_, max(), rate_, 1 / kept().e}; }

  // Drops what is below the pivot. The whole team calls this.
  DFLASH_INLINE void keep_from(float pivot) {
    pivot_ = pivot;
    lowest_ = smallest_logit(pivot, temperature_);
    const Masses<T> mass = masses();
    for (int t = own_begin() + warp_id(); t < own_end(); t += kWarps) {
      float e = 0, e_exponent = 0;
      if (memory_.tiles[t].best.first >= lowest_) {
        for_each_logit(t, [&](float x) {
          const float exponent = mass.exponent(x);
          const float own = x >= lowest_ ? exp2_of(exponent) : 0.f;
          e += own;
          e_exponent += own * exponent;
        });
      }
      e = warp_sum(e);
      e_exponent = warp_sum(e_exponent);
      if (lane_id() == 0) memory_.kept[t] = {e, e_exponent};
    }
    exchange(memory_.kept);
    const Sums sum = total(memory_.kept);
    if (threadIdx.x == 0) memory_.kept_sum = sum;
    __syncthreads();
  }

  // Sums any masses by tile, into sums.e. The whole team calls this.
  template <class Mass>
  DFLASH_INLINE Sums sum_tiles(Sums* sums, Mass&& mass) const {
    for (int t = own_begin() + warp_id(); t < own_end(); t += kWarps) {
      float sum = 0;
      if (memory_.tiles[t].best.first >= lowest_) {
        for_each_chunk(t, [&](uint32_t token, const Chunk<T>& chunk) {
          float own[kSize];
          mass(own, token, chunk);
#pragma unroll
          for (int k = 0; k < kSize; ++k) sum += own[k];
        });
      }
      sum = warp_sum(sum);
      if (lane_id() == 0) sums[t] = {sum, 0};
    }
    exchange(sums);
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

  // Inverts the CDF in the order of the vocabulary, with one number of [0, 1). The masses' sums by tile must be those
  // of sum_tiles, or memory.kept for the filtered distribution. Returns -1 if there is no mass. A whole warp calls this.
  template <class Mass>
  DFLASH_INLINE int draw(double uniform, const Sums* sums, Mass&& mass) const {
    const int lanes_share = (tiles_ + 31) / 32;
    const int begin = min(tiles_, lane_id() * lanes_share), end = min(tiles_, begin + lanes_share);
    double own = 0;
    for (int t = begin; t < end; ++t) own += sums[t].e;
    const double passed = warp_scan(own), all = __shfl_sync(~0u, passed, 31);
    if (!(all > 0)) return -1;
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

  DFLASH_INLINE int own_begin() const { return min(tiles_, Team::rank() * share_); }
  DFLASH_INLINE int own_end() const { return min(tiles_, (Team::rank() + 1) * share_); }

  // Calls f(token, chunk) for all chunks of a tile: the logits of tokens [token, token + kSize), -inf past the end.
  template <class F>
  DFLASH_INLINE void for_each_chunk(int t, F&& f) const {
    for_each_batch<kLoads / 2>(t, [&](auto&& for_each) { for_each(f); });
  }

  template <class F>
  DFLASH_INLINE void for_each_logit(int t, F&& f) const {
    for_each_chunk(t, [&](uint32_t, const Chunk<T>& chunk) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) f(to_float(chunk.values[k]));
    });
  }

  // Gives all blocks of the team what each has written for its own tiles.
  template <class S>
  DFLASH_INLINE void exchange(S* by_tile) const {
    Team::sync();
    if (Team::size() == 1) return;
    for (int t = threadIdx.x; t < tiles_; t += kThreads) {
      const int owner = t / share_;
      if (owner != Team::rank()) by_tile[t] = Team::of(by_tile, owner)[t];
    }
    Team::sync();
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
  // For every kCount chunks of this lane in a tile, calls f(for_each), by which f can call g(token, chunk) for these
  // chunks, several times.
  template <int kCount, class F>
  DFLASH_INLINE void for_each_batch(int t, F&& f) const {
    constexpr int kBatch = 32 * kCount * kSize;
    const uint32_t tile_begin = t * tile_size_, tile_end = min(vocab_, tile_begin + tile_size_);
    for (uint32_t begin = tile_begin; begin < tile_end; begin += kBatch) {
      const uint32_t first = begin + lane_id() * kSize;
      if (aligned_ && begin + kBatch <= vocab_) {
        Chunk<T> chunks[kCount];
#pragma unroll
        for (int c = 0; c < kCount; ++c) chunks[c] = *reinterpret_cast<const Chunk<T>*>(x_ + first + c * 32 * kSize);
        f([&](auto&& g) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) g(first + c * 32 * kSize, chunks[c]);
        });
      } else {
        f([&](auto&& g) {
#pragma unroll 1
          for (int c = 0; c < kCount; ++c) {
            const uint32_t token = first + c * 32 * kSize;
            g(token, load_chunk(x_, vocab_, token, aligned_));
          }
        });
      }
    }
  }

  DFLASH_INLINE void read_tile(int t, bool with_sums) {
    Best best;
    float e = 0, e_exponent = 0;
    for_each_batch<kLoads>(t, [&](auto&& for_each) {
      const float before = best.first;
      BestOfChunks<T> maxima;
      for_each([&](uint32_t, const Chunk<T>& chunk) { maxima.add(chunk); });
      best.merge(maxima.best());
      if (!with_sums) return;
      const Masses<T> mass{-kInfinity, best.first, rate_, 1};
      const float shift = mass.exponent(before), scale = exp2_of(shift);
      e_exponent = scale * (e_exponent + shift * e);
      e *= scale;
      for_each([&](uint32_t, const Chunk<T>& chunk) {
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
      const float shift = Masses<T>{0, best.first, rate_, 1}.exponent(lane_max), scale = exp2_of(shift);
      e_exponent = warp_sum(scale * (e_exponent + shift * e));
      e = warp_sum(scale * e);
    }
    if (lane_id() == 0) memory_.tiles[t] = {best, e, e_exponent};
  }

  // Returns the first lane of which the first holds, or else the last of which the second holds.
  DFLASH_INLINE static int first_or_last(bool first, bool last) {
    const unsigned firsts = __ballot_sync(~0u, first), lasts = __ballot_sync(~0u, last);
    return firsts ? __ffs(firsts) - 1 : 31 - __clz(lasts);
  }

  DFLASH_INLINE int first_equal(int t) const {
    unsigned found = ~0u;
    for_each_chunk(t, [&](uint32_t token, const Chunk<T>& chunk) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (to_float(chunk.values[k]) == max()) found = min(found, token + k);
      }
    });
    return __reduce_min_sync(~0u, found);
  }

  // Returns the token of a tile at which the running sum of masses exceeds the target; the last with a mass if the sum
  // stays below it because of rounding.
  template <class Mass>
  DFLASH_INLINE int token_in_tile(int t, double target, Mass&& mass) const {
    double passed = 0;
    uint32_t last = 0;
    const uint32_t tile_begin = t * tile_size_, tile_end = min(vocab_, tile_begin + tile_size_);
    for (uint32_t begin = tile_begin; begin < tile_end; begin += kStep<T>) {
      float sums[kLoads];
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        const uint32_t token = begin + (c * 32 + lane_id()) * kSize;
        float own[kSize];
        mass(own, token, load_chunk(x_, vocab_, token, aligned_));
        sums[c] = 0;
#pragma unroll
        for (int k = 0; k < kSize; ++k) sums[c] += own[k];
      }
#pragma unroll
      for (int c = 0; c < kLoads; ++c) sums[c] = warp_sum(sums[c]);
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        const uint32_t first = begin + c * 32 * kSize;
        if (sums[c] > 0 && passed + sums[c] > target) return token_in_chunks(first, float(target - passed), mass);
        passed += sums[c];
        if (sums[c] > 0) last = first;
      }
    }
    return token_in_chunks(last, kInfinity, mass);
  }

  // The same among 32 chunks.
  template <class Mass>
  DFLASH_INLINE int token_in_chunks(uint32_t first, float target, Mass&& mass) const {
    const uint32_t begin = first + lane_id() * kSize;
    float own[kSize], sum = 0;
    mass(own, begin, load_chunk(x_, vocab_, begin, aligned_));
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum += own[k];
    const float passed = warp_scan(sum);
    const int lane = first_or_last(sum > 0 && passed > target, sum > 0);
    float running = passed - sum;
    int token = -1;
    bool is_found = false;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      running += own[k];
      if (!is_found && own[k] > 0) token = begin + k;
      is_found = is_found || running > target;
    }
    return __shfl_sync(~0u, token, lane);
  }

  const T* const x_;
  const uint32_t vocab_;
  const bool aligned_;
  RowMemory& memory_;
  const float temperature_, rate_;
  const uint32_t tile_size_;  // tokens
  const int tiles_;           // of the row
  const int share_;           // tiles of a block

  float max_, lowest_ = -kInfinity, pivot_ = -kInfinity;
};

}  // namespace dflash::DFLASH_ISA
