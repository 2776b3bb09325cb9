// The share of a row of logits that a block of a team has: its tiles, loops over them, and the shared memory in which a
// team keeps the row.
#pragma once

#include "common/cp_async.h"
#include "common/shared_memory.h"
#include "sample/row_batches.h"
#include "sample/row_tiles.h"
#include "sample/team.h"

namespace dflash::DFLASH_ISA {

// Source: PlainLogits or PenalisedLogits.
template <class Source, class Team>
class RowShare {
  using Values = typename Source::Values;
  static constexpr int kSize = Source::kSize;

 public:
  DFLASH_INLINE explicit RowShare(const Source& logits)
      : logits_(logits), vocab_(logits.vocab), tile_size_(tile_size_of<Source>(vocab_)),
        tiles_((vocab_ + tile_size_ - 1) / tile_size_), share_((tiles_ + Team::size() - 1) / Team::size()) {}

  // Calls f(tile) for the tiles of this warp.
  template <class F>
  DFLASH_INLINE void for_each_own_tile(F&& f) const {
#pragma unroll 1
    for (int t = own_begin() + warp_id(); t < own_end(); t += kWarps) f(t);
  }

  // Writes what belongs to a tile into the memory of all blocks. A whole warp calls this; it is there after Team::sync.
  template <class S>
  DFLASH_INLINE void publish(S* by_tile, int t, const S& value) const {
    if (lane_id() < Team::size()) *Team::of(by_tile + t, lane_id()) = value;
  }

  // Starts to copy another row of the same vocabulary into the shared memory behind the kept one, this block's share of
  // it. A lane reads there what it copied itself, after cp_async_wait_group<0>.
  template <class Logits>
  DFLASH_INLINE void keep_beside(const Logits& logits) const {
    for_each_own_tile([&](int t) {
#pragma unroll 1
      for (uint32_t begin = t * tile_size_; begin < (t + 1) * tile_size_; begin += kLoads * kGroup) {
        const uint32_t first = begin + lane_id() * kSize;
        typename Logits::Values* const kept = kept_beside<Logits>(first);
        if (logits.kIsRaw && logits.is_whole(begin + kLoads * kGroup)) {
          const auto* const source = static_cast<const typename Logits::Values*>(logits.address(first));
#pragma unroll
          for (int c = 0; c < kLoads; ++c) cp_async(shared_address(kept + c * 32), source + c * 32);
        } else {
#pragma unroll 1
          for (int c = 0; c < kLoads; ++c) kept[c * 32] = logits.at(first + c * kGroup);
        }
      }
    });
    cp_async_commit_group();
  }
  template <class Logits>
  DFLASH_INLINE typename Logits::Values* kept_beside(uint32_t token) const {
    return reinterpret_cast<typename Logits::Values*>(kept_chunk(share_ * tile_size_ + token));
  }

 protected:
  // The tokens of which a warp has a chunk a lane. A tile consists of whole groups.
  static constexpr uint32_t kGroup = 32 * kSize;

  // Whether this block has a tile.
  DFLASH_INLINE bool has(int t) const { return t >= own_begin() && t < own_end(); }

  // Calls f(batch) for the batches of this lane's chunks in a tile. kKept: they come from where the team keeps the row;
  // otherwise from global memory.
  template <int kCount, bool kKept = Team::kKeepsRow, class F>
  DFLASH_INLINE void for_each_batch(int t, F&& f) const {
    constexpr int kTokens = 32 * kCount * kSize;
    const uint32_t tile_begin = t * tile_size_, tile_end = min(vocab_, tile_begin + tile_size_);
#pragma unroll 1
    for (uint32_t begin = tile_begin; begin < tile_end; begin += kTokens) {
      if constexpr (kKept) {
        const uint32_t first = begin + lane_id() * kSize;
        f(KeptBatch<Source, kCount>{first, kept_chunk(first)});
      } else {
        with_batch<kCount>(logits_, begin, f);
      }
    }
  }

  // A chunk of the row in shared memory, of a tile of this warp.
  DFLASH_INLINE Values* kept_chunk(uint32_t token) const {
    extern __shared__ uint4 kept_row[];
    return reinterpret_cast<Values*>(kept_row) + int(token / kSize) - int(own_begin() * (tile_size_ / kSize));
  }
  DFLASH_INLINE Values at(uint32_t token) const {
    if constexpr (Team::kKeepsRow) {
      return load_kept(kept_chunk(token));
    } else {
      return logits_.at(token);
    }
  }

  DFLASH_INLINE int own_begin() const { return min(tiles_, Team::rank() * share_); }
  DFLASH_INLINE int own_end() const { return min(tiles_, (Team::rank() + 1) * share_); }

  const Source logits_;
  const uint32_t vocab_;
  const uint32_t tile_size_;  // tokens
  const int tiles_;           // of the row
  const int share_;           // tiles of a block
};

}  // namespace dflash::DFLASH_ISA
