// What moves past a block of the portable backward, tile by tile: the tiles of rows that see its keys, or the tiles of
// keys that its rows see.
#pragma once

#include "attn/tile_sight.h"
#include "attn/sm80/key_tiles_by_run.h"

namespace dflash::DFLASH_ISA::sm80 {

// A tile of rows or keys that moves.
struct Moving {
  int first;       // the tile's first key, or its first row in the rows of a head group
  int group;       // of rows: the head group, counted from the key head's first
  bool is_full;    // all rows see all keys
  bool has_empty;  // some row sees nothing
  bool exists;
};

// The tiles of rows that see some of the keys [lo, hi), head group by head group. A walk lies in shared memory, and all
// lanes of a warp call next() together.
class RowTiles {
 public:
  DFLASH_INLINE RowTiles(const RowTile* tiles, int count, int groups, int lo, int hi)
      : tiles_(tiles), count_(count), groups_(groups), lo_(lo), hi_(hi) {}

  template <int kTileRows>
  DFLASH_INLINE Moving next() {
    const int lane = threadIdx.x % 32;
    int base = base_, group = group_;
    uint32_t seen = seen_, full = full_, empty = empty_;
    while (seen == 0) {
      if (base >= count_) {
        base = 0;
        ++group;
      }
      if (group >= groups_ || count_ == 0) break;
      TileSight sight;
      if (base + lane < count_) sight = TileSight(tiles_[base + lane], lo_, hi_);
      seen = __ballot_sync(~0u, sight.is_seen);
      full = __ballot_sync(~0u, sight.is_full);
      empty = __ballot_sync(~0u, sight.has_empty);
      base += 32;
    }
    __syncwarp();
    if (lane == 0) {
      base_ = base;
      group_ = group;
      seen_ = seen & (seen - 1);
      full_ = full;
      empty_ = empty;
    }
    __syncwarp();
    if (seen == 0) return {};
    const int bit = __ffs(seen) - 1;
    return {(base - 32 + bit) * kTileRows, group, (full >> bit & 1) != 0, (empty >> bit & 1) != 0, true};
  }

 private:
  const RowTile* tiles_;
  int count_, groups_, lo_, hi_;
  int base_ = 0, group_ = 0;
  uint32_t seen_ = 0, full_ = 0, empty_ = 0;
};

// Merges what consecutive tiles of rows see into one plan, as the forward has it.
DFLASH_INLINE TilePlan merged(const RowTile* tiles, int count) {
  TilePlan plan{};
  for (int i = 0; i < 2; ++i) {
    int lo = 0, hi = 0, full_lo = tiles[0].full_lo[i], full_hi = tiles[0].full_hi[i];
    for (int tile = 0; tile < count; ++tile) {
      const RowTile& t = tiles[tile];
      if (t.lo[i] < t.hi[i]) {
        lo = hi == 0 ? t.lo[i] : min(lo, t.lo[i]);
        hi = max(hi, t.hi[i]);
      }
      full_lo = max(full_lo, t.full_lo[i]);
      full_hi = min(full_hi, t.full_hi[i]);
    }
    plan.lo[i] = lo;
    plan.hi[i] = hi;
    plan.full_lo[i] = full_lo;
    plan.full_hi[i] = full_hi;
  }
  if (plan.lo[1] < plan.hi[1] && (plan.lo[0] >= plan.hi[0] || plan.lo[1] < plan.lo[0])) {
    const auto swap = [](int32_t(&x)[2]) {
      const int32_t first = x[0];
      x[0] = x[1];
      x[1] = first;
    };
    swap(plan.lo);
    swap(plan.hi);
    swap(plan.full_lo);
    swap(plan.full_hi);
  }
  return plan;
}

// The tiles of keys that some of the given tiles of rows see.
template <int kKeys>
class KeyTilesOfRows {
 public:
  DFLASH_INLINE KeyTilesOfRows(const RowTile* tiles, int count) : plan_(merged(tiles, count)), tiles_(plan_) {}

  template <int kTileRows>
  DFLASH_INLINE Moving next() {
    const int i = i_;
    if (i >= tiles_.count()) return {};
    __syncwarp();
    if (threadIdx.x % 32 == 0) i_ = i + 1;
    __syncwarp();
    const int first = tiles_[i];
    return {first, 0, tiles_.is_full(first), false, true};
  }

  // Whether some row may see the key.
  DFLASH_INLINE bool has(int key) const {
    return (key >= plan_.lo[0] && key < plan_.hi[0]) || (key >= plan_.lo[1] && key < plan_.hi[1]);
  }

 private:
  TilePlan plan_;
  KeyTilesByRun<kKeys> tiles_;
  int i_ = 0;
};

}  // namespace dflash::DFLASH_ISA::sm80
