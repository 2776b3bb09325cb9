// One row of logits on a GPU: its sums, and draws from it. A team of blocks reads it, a tile of tokens per warp and
// turn. Every tile is summed by one warp in one order, and the tiles' sums are added in one order, so that a row's
// results depend neither on the size of the team nor on the other rows.
#pragma once

#include "sample/row_share.h"

namespace dflash::DFLASH_ISA {

// Takes the masses of a chunk, exp2((x - top) * rate), as they are computed by Row::read. This one drops them.
struct NoMasses {
  template <int kCount>
  DFLASH_INLINE void operator()(uint32_t, const float (&)[kCount], float) {}
};

// Source: PlainLogits, CappedLogits or PenalisedLogits.
template <class Source, class Team>
class Row : public RowShare<Source, Team> {
  using Share = RowShare<Source, Team>;
  using Values = typename Source::Values;
  using Share::kGroup, Share::logits_, Share::vocab_, Share::tile_size_, Share::tiles_;
  using Share::at, Share::has, Share::kept_chunk;

 public:
  using Share::for_each_own_tile, Share::publish;
  static constexpr int kSize = Source::kSize;

  DFLASH_INLINE Row(const Source& logits, float temperature, RowMemory& memory)
      : Share(logits), memory_(memory), temperature_(temperature == 0 ? 1 : temperature), rate_(kLog2E / temperature_) {
    Team::arrive_at_start();
  }

  // Reads the maxima of the row, and its sums if `with_sums`. This is the one read that goes to memory. The whole team
  // calls this once. kFilters: filters may follow. meanwhile(): what one warp does first, while the others read. next():
  // what all warps do when the row has been read, before its sums are added up. taken(token, masses, top): takes the
  // masses of every chunk, those of the tokens from `token` on. kCount: chunks that a lane loads at once.
  template <bool kFilters, int kCount = kLoads, class Meanwhile, class Next, class Taken = NoMasses>
  DFLASH_INLINE void read(bool with_sums, const Meanwhile& meanwhile, const Next& next, Taken&& taken = NoMasses()) {
    Team::wait_for_start();
    if (warp_id() == kWarps - 1) meanwhile();  // it has the fewest tiles
    for_each_own_tile([&](int t) { publish(memory_.tiles, t, read_tile<kFilters, kCount>(t, with_sums, taken)); });
    Team::sync();
    next();
    float max = -kInfinity;
    for_each_tile<32>(lane_id(), tiles_, [this](int t) { return memory_.tiles[t].best.first; },
                      [&](int, float first) { max = fmaxf(max, first); });
    max_ = warp_max(max);
    if (with_sums) total_ = total([this](int t) { return sums_of(t).e; });
  }

  DFLASH_INLINE int vocab() const { return vocab_; }
  DFLASH_INLINE int tiles() const { return tiles_; }
  DFLASH_INLINE float temperature() const { return temperature_; }
  DFLASH_INLINE float rate() const { return rate_; }
  DFLASH_INLINE float max() const { return max_; }
  DFLASH_INLINE bool is_certain() const { return max() == kInfinity; }  // a point mass at the argmax
  DFLASH_INLINE bool is_empty() const { return max() == -kInfinity; }   // nothing but -inf and NaN
  DFLASH_INLINE float logit(int64_t token) const { return logits_[token]; }
  DFLASH_INLINE const Tile& tile(int t) const { return memory_.tiles[t]; }
  // The sums of a tile, before the filters, and after them if sum_kept was called.
  DFLASH_INLINE Sums sums_of(int t) const {
    const Tile& tile = memory_.tiles[t];
    const float shift = (Masses{0, max_, rate_, 1}).exponent(tile.best.first), scale = exp2_of(shift);
    return {scale * tile.e, scale * (tile.e_exponent + shift * tile.e)};
  }
  DFLASH_INLINE Sums kept_of(int t) const { return pivot_ > -kInfinity ? memory_.kept[t] : sums_of(t); }
  // A whole warp calls the next three.
  DFLASH_INLINE float second() const {
    Best best = Best::none();
#pragma unroll 1
    for (int t = lane_id(); t < tiles_; t += 32) best.merge(memory_.tiles[t].best);
    best.merge_warp();
    return best.second;
  }
  DFLASH_INLINE Sums sums() const {
    return totals([this](int t) { return sums_of(t); });
  }
  DFLASH_INLINE Sums kept_sums() const {
    return totals([this](int t) { return kept_of(t); });
  }

  // The distribution after the filters, of which `pivot` is the smallest z = logit / temperature.
  DFLASH_INLINE float kept() const { return total_; }
  DFLASH_INLINE float pivot() const { return pivot_; }  // -inf if nothing was dropped
  DFLASH_INLINE float lowest() const { return lowest_; }
  DFLASH_INLINE float normaliser() const { return max() / temperature_ + logf(kept()); }
  DFLASH_INLINE Masses masses() const { return {lowest_, max(), rate_, 1}; }
  DFLASH_INLINE Masses probabilities() const { return {lowest_, max(), rate_, 1 / kept()}; }

  // Drops what is below the pivot. `kept`: the mass of what is left, or 0 if it is not known. The whole team calls this.
  DFLASH_INLINE void keep_from(float pivot, float kept) {
    pivot_ = pivot;
    lowest_ = smallest_logit(pivot, temperature_);
    total_ = kept;
    is_summed_ = false;
    if (kept == 0) sum_kept();
  }

  // Sums by tile what the filters keep, if that was not done. The whole team calls this. Between two calls that have
  // something to do the team must have synchronised.
  DFLASH_INLINE void sum_kept() {
    if (is_summed_) return;
    is_summed_ = true;
    const Masses mass = masses();
    for_each_own_tile([&](int t) {
      float e = 0, e_exponent = 0;
      for_each_chunk_from<kLoads>(lowest_, t, [&](const Values& chunk) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const float x = to_float(chunk.values[k]), exponent = mass.exponent(x);
          const float own = x >= lowest_ ? exp2_of(exponent) : 0.f;
          e += own;
          e_exponent += own * exponent;
        }
      });
      publish(memory_.kept, t, {warp_sum(e), warp_sum(e_exponent)});
    });
    Team::sync();
    total_ = total([this](int t) { return memory_.kept[t].e; });
  }

  // Sums any masses by tile. The whole team calls this. No block may still read `sums`.
  template <class Mass>
  DFLASH_INLINE void sum_tiles(float* sums, const Mass& mass) const {
    for_each_own_tile([&](int t) { publish(sums, t, sum_in(t, mass)); });
    Team::sync();
  }
  // Sums masses in the tile of a token, if the row has it, and returns that tile or -1. The whole team calls this.
  template <class Mass>
  DFLASH_INLINE int sum_tile_of(uint32_t token, float* sum, const Mass& mass) const {
    if (token >= vocab_) return -1;
    const int t = token / tile_size_;
    if (has(t) && warp_id() == 0) publish(sum, 0, sum_in(t, mass));
    Team::sync();
    return t;
  }

  struct Token {
    int id;
    float logit;
  };
  static constexpr Token kNoToken{-1, 0};

  // Returns the tile of the first of the largest logits. A whole warp calls this.
  DFLASH_INLINE int tile_of_argmax() const {
    for (int base = 0; base < tiles_; base += 32) {
      const int t = base + lane_id();
      const unsigned has = __ballot_sync(~0u, t < tiles_ && memory_.tiles[t].best.first == max());
      if (has) return base + __ffs(has) - 1;
    }
    return 0;
  }
  // Returns the first token of the largest logit (0 if there is none) to one warp of the team, and kNoToken to the others.
  // The whole team calls this.
  DFLASH_INLINE Token argmax() const {
    if (is_empty()) return Team::rank() == 0 && warp_id() == 0 ? Token{0, logits_[0]} : kNoToken;
    const int t = tile_of_argmax();
    if (!has(t)) return kNoToken;
    unsigned found = ~0u;
    for_each_group(t, [&](uint32_t group) {
      const Values chunk = at(group + lane_id() * kSize);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (to_float(chunk.values[k]) == max()) found = min(found, group + lane_id() * kSize + k);
      }
    });
    found = __reduce_min_sync(~0u, found);
    if (lane_id() == 0) memory_.found[warp_id()] = found;
    __syncthreads();
    const unsigned first = __reduce_min_sync(~0u, memory_.found[lane_id() % kWarps]);
    return first == found ? Token{int(first), max()} : kNoToken;
  }

  // Where a draw lands: in a tile, at a mass of its own masses.
  struct Place {
    int tile;  // -1: there is no mass
    double target;
  };

  // Inverts the CDF of the tiles in the order of the vocabulary, with one number of [0, 1). mass_of(t): of a tile. A
  // whole warp calls this, and every warp finds the same.
  template <class MassOf>
  DFLASH_INLINE Place place_of(double uniform, const MassOf& mass_of) const {
    const int lanes_share = (tiles_ + 31) / 32;
    const int begin = min(tiles_, lane_id() * lanes_share), end = min(tiles_, begin + lanes_share);
    double own = 0;
    for_each_tile<1>(begin, end, mass_of, [&](int, float mass) { own += mass; });
    const double passed = warp_scan(own), all = __shfl_sync(~0u, passed, 31);
    if (!(all > 0)) return {-1, 0};
    const double target = uniform * all;
    const int lane = first_or_last(own > 0 && passed > target, own > 0);
    double before = __shfl_up_sync(~0u, passed, 1);
    if (lane == 0) before = 0;
    int tile_of_target = -1;  // or the last with a mass, if the sum stays below the target because of rounding
    float last = 0;
    for_each_tile<1>(begin, end, mass_of, [&](int t, float mass) {
      if (before + last > target || !(mass > 0)) return;
      before += last;
      last = mass;
      tile_of_target = t;
    });
    return {__shfl_sync(~0u, tile_of_target, lane), target - __shfl_sync(~0u, before, lane)};
  }
  // The same for the distribution after the filters, if sum_kept was called.
  DFLASH_INLINE Place place_of(double uniform) const {
    return place_of(uniform, [this](int t) { return kept_of(t).e; });
  }

  // Returns the token at which the running sum of a tile's masses exceeds the target (the last with a mass if the sum
  // stays below it because of rounding) to one warp of the team, and kNoToken to the others. The whole team calls this.
  template <class Mass>
  DFLASH_INLINE Token token_at(const Place& place, const Mass& mass) const {
    if (!has(place.tile)) return kNoToken;
    double passed = 0;
    float rest = kInfinity;
    uint32_t first = place.tile * tile_size_;  // of the group that holds the token
    const uint32_t end = first + tile_size_;
#pragma unroll 1
    for (uint32_t begin = first; begin < end; begin += kWarps * kGroup) {
      const uint32_t group = begin + warp_id() * kGroup;
      float sum = 0;
      if (group < end) {
        float own[kSize];
        masses_of(own, group + lane_id() * kSize, mass);
#pragma unroll
        for (int k = 0; k < kSize; ++k) sum += own[k];
        sum = warp_sum(sum);
      }
      if (lane_id() == 0) memory_.group_sums[warp_id()] = sum;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float sum_of_group = memory_.group_sums[w];
        if (rest < kInfinity || !(sum_of_group > 0)) continue;
        first = begin + w * kGroup;
        if (passed + sum_of_group > place.target) rest = place.target - passed;
        passed += sum_of_group;
      }
      __syncthreads();
    }
    return warp_id() == int(first / kGroup % kWarps) ? token_in_group(first, rest, mass) : kNoToken;
  }

  // Calls f(chunk) for this lane's chunks in a tile that have a logit of at least `lowest`, after read<true>. Past the
  // end of the row logits are -inf. kCount chunks are loaded at once; it is small where f takes many registers.
  template <int kCount = kLoads / 4, class F>
  DFLASH_INLINE void for_each_chunk_from(float lowest, int t, F&& f) const {
    if (!reaches(t, lowest)) return;
    this->template for_each_batch<kCount>(t, [&](const auto& batch) {
      batch.for_each([&](int, uint32_t, const Values& chunk) {
        if (largest_of(chunk) >= lowest) f(chunk);
      });
    });
  }

  // Returns the sum over all tiles. A whole warp calls this, and every warp finds the same.
  template <class MassOf>
  DFLASH_INLINE float total(const MassOf& mass_of) const {
    double sum = 0;
    for_each_tile<32>(lane_id(), tiles_, mass_of, [&](int, float mass) { sum += mass; });
    return warp_sum(sum);
  }

 private:
  // The largest logits of every lane in every tile, rounded up, of rows that would be read from memory again. A lane
  // need not read a tile that does not reach the filters' bound.
  static constexpr bool kHasLaneMaxima = !Team::kKeepsRow && Source::kIsPlain;
  DFLASH_INLINE __nv_bfloat16& lane_maximum(int t) const {
    extern __shared__ uint4 kept_row[];
    return reinterpret_cast<__nv_bfloat16*>(kept_row)[t * 32 + lane_id()];
  }
  // Whether this lane may have a logit of at least `lowest` in a tile.
  DFLASH_INLINE bool reaches(int t, float lowest) const {
    if (!(memory_.tiles[t].best.first >= lowest)) return false;
    if constexpr (kHasLaneMaxima) return to_float(lane_maximum(t)) >= lowest;
    return true;
  }

  template <bool kFilters, int kCount, class Taken>
  DFLASH_INLINE Tile read_tile(int t, bool with_sums, Taken& taken) const {
    Best best = Best::none();
    float e = 0, e_exponent = 0;
    this->template for_each_batch<kCount, false>(t, [&](const auto& batch) {
      using Loaded = typename std::remove_cvref_t<decltype(batch)>::Values;
      const float before = best.first;
      BestOfChunks<Loaded> maxima;
      batch.for_each([&](int c, uint32_t token, const Loaded& chunk) {
        maxima.add(chunk);
        if constexpr (Team::kKeepsRow) *kept_chunk(token) = chunk;
      });
      if constexpr (!std::is_same_v<Loaded, Values>) {
        add_capped(best, e, e_exponent, batch, maxima.best(), taken);
        return;
      }
      best.merge(maxima.best());
      if (!with_sums) return;
      const Masses mass{-kInfinity, best.first, rate_, 1};
      const float shift = mass.exponent(before), scale = exp2_of(shift);
      e_exponent = scale * (e_exponent + shift * e);
      e *= scale;
      const auto add_masses = [&](int, uint32_t token, const Loaded& chunk) {
        float masses[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const float exponent = mass.exponent(to_float(chunk.values[k]));
          masses[k] = exp2_of(exponent);
          e += masses[k];
          e_exponent += masses[k] * exponent;
        }
        taken(token, masses, best.first);
      };
      if constexpr (Team::kKeepsRow) {
        KeptBatch<Source, kCount>{batch.first, kept_chunk(batch.first)}.for_each(add_masses);
      } else {
        batch.for_each(add_masses);
      }
    });
    if constexpr (Source::kIsPlain && !std::is_same_v<Source, typename Source::Raw>) {
      if (!(e > 0)) best = Best::none();  // a cap gives a lane of nothing but NaN the cap of -inf
    }
    const float lane_max = best.first;
    if constexpr (kFilters && kHasLaneMaxima) lane_maximum(t) = __float2bfloat16_ru(lane_max);
    best.merge_warp();
    if (with_sums) {
      const float shift = Masses{0, best.first, rate_, 1}.exponent(lane_max), scale = exp2_of(shift);
      e_exponent = warp_sum(scale * (e_exponent + shift * e));
      e = warp_sum(scale * e);
    }
    return {best, e, e_exponent};
  }

  // Adds a batch of logits that lie in memory without their soft cap, of which `largest` are the two largest. Its sums
  // are relative to its own maximum at first: differences of units are exact there, however small the temperature is.
  template <class Batch, class Taken>
  DFLASH_INLINE void add_capped(Best& best, float& e, float& e_exponent, const Batch& batch, Best largest,
                                Taken& taken) const {
    const float softcap = logits_.softcap, top = logits_.unit(largest.first), rate = fminf(softcap * rate_, 3e38f);
    const float before = best.first, now = softcap * top;
    float own = 0, own_exponent = 0;
    batch.for_each([&](int, uint32_t token, const auto& chunk) {
      float masses[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const float exponent = fmaxf((logits_.unit(to_float(chunk.values[k])) - top) * rate, -1e4f);  // NaN: no mass
        masses[k] = exp2_of(exponent);
        own += masses[k];
        own_exponent += masses[k] * exponent;
      }
      taken(token, masses, now);
    });
    best.merge({now, softcap * logits_.unit(largest.second)});
    const Masses mass{-kInfinity, best.first, rate_, 1};
    const float shift = mass.exponent(before), own_shift = mass.exponent(now);
    e_exponent = exp2_of(shift) * (e_exponent + shift * e) + exp2_of(own_shift) * (own_exponent + own_shift * own);
    e = exp2_of(shift) * e + exp2_of(own_shift) * own;
  }

  // Calls f(first token) for this warp's groups of a tile, in which all warps of the block take part.
  template <class F>
  DFLASH_INLINE void for_each_group(int t, F&& f) const {
    const uint32_t begin = t * tile_size_, end = begin + tile_size_;
#pragma unroll 1
    for (uint32_t group = begin + warp_id() * kGroup; group < end; group += kWarps * kGroup) f(group);
  }

  // Writes the masses of a chunk, and returns its logits.
  template <class Mass>
  DFLASH_INLINE Values masses_of(float (&own)[kSize], uint32_t token, const Mass& mass) const {
    const Batch<Source, 1> batch{token, logits_};
    const Values x = at(token);
    mass.of(batch)(own, 0, token, x);
    return x;
  }

  // The same as token_at in a group.
  template <class Mass>
  DFLASH_INLINE Token token_in_group(uint32_t first, float target, const Mass& mass) const {
    const uint32_t begin = first + lane_id() * kSize;
    float own[kSize], sum = 0;
    const Values x = masses_of(own, begin, mass);
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
      if (!is_found && own[k] > 0) token = {int(begin + k), to_float(x.values[k])};
      is_found = is_found || running > target;
    }
    return {__shfl_sync(~0u, token.id, lane), __shfl_sync(~0u, token.logit, lane)};
  }

  // Sums masses in a tile. A whole warp calls this.
  template <class Mass>
  DFLASH_INLINE float sum_in(int t, const Mass& mass) const {
    float sum = 0;
    if (lowest_ == -kInfinity || reaches(t, lowest_)) {
      this->template for_each_batch<kLoads / 2>(t, [&](const auto& batch) {
        const auto of_chunk = mass.of(batch);
        batch.for_each([&](int c, uint32_t token, const Values& x) {
          if (lowest_ > -kInfinity && !(largest_of(x) >= lowest_)) return;
          float own[kSize];
          of_chunk(own, c, token, x);
#pragma unroll
          for (int k = 0; k < kSize; ++k) sum += own[k];
        });
      });
    }
    return warp_sum(sum);
  }

  template <class SumsOf>
  DFLASH_INLINE Sums totals(const SumsOf& sums_of_tile) const {
    double e = 0, e_exponent = 0;
#pragma unroll 1
    for (int t = lane_id(); t < tiles_; t += 32) {
      const Sums own = sums_of_tile(t);
      e += own.e;
      e_exponent += own.e_exponent;
    }
    return {float(warp_sum(e)), float(warp_sum(e_exponent))};
  }

  RowMemory& memory_;
  const float temperature_, rate_;
  float max_, total_ = 0, lowest_ = -kInfinity, pivot_ = -kInfinity;
  bool is_summed_ = true;  // kept_of knows what the filters keep
};

}  // namespace dflash::DFLASH_ISA
