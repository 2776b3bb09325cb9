// What moves past a block of the portable backward, tile by tile: the tiles of rows that see its keys, or the tiles of
// keys that its rows see.
#pragma once

#include "attn/tile_sight.h"
#include "attn/sm80/key_tiles_by_run.h"

namespace dflash::DFLASH_ISA::sm80 {

// A tile of rows or keys that moves.
struct alignas(16) Moving {
  int first;       // the tile's first key, or its first row in the rows of a head group
  int group;       // of rows: the head group, counted from the key head's first
  bool is_full;    // all rows see all keys
  bool has_empty;  // some row sees nothing
  bool exists;
};

// Moving tiles by their number. A tile takes the place of the one that came kTiles before it.
class MovingRing {
 public:
  static constexpr int kTiles = 64;  // a power of two, at least the 32 that a walk finds at a time and those in use

  DFLASH_INLINE Moving& operator[](int i) { return tiles_[i & (kTiles - 1)]; }

 private:
  Moving tiles_[kTiles];
};

// The tiles of rows that see some of the keys [lo, hi), head group by head group. A walk lies in shared memory.
class RowTiles {
 public:
  DFLASH_INLINE RowTiles(const RowTile* tiles, int count, int groups, int lo, int hi)
      : tiles_(tiles), count_(count), groups_(groups), lo_(lo), hi_(hi) {}

  // Writes tile `last` to the ring, unless an earlier call did, and at most 31 tiles after it. One warp calls this for
  // 0, 1, 2 and so on.
  template <int kTileRows>
  DFLASH_INLINE void find(int last, MovingRing& ring) {
    const int lane = threadIdx.x % 32;
    int base = base_, group = group_, found = found_;
    if (found > last) return;
    while (found <= last) {
      if (base >= count_) {
        base = 0;
        ++group;
      }
      const bool is_over = group >= groups_ || count_ == 0;
      TileSight sight;
      if (!is_over && base + lane < count_) sight = TileSight(tiles_[base + lane], lo_, hi_);
      const uint32_t seen = __ballot_sync(~0u, sight.is_seen);
      if (sight.is_seen) {
        ring[found + __popc(seen & ((1u << lane) - 1))] = {(base + lane) * kTileRows, group, sight.is_full,
                                                           sight.has_empty, true};
      }
      if (is_over && lane == 0) ring[found] = {};
      found += is_over ? 1 : __popc(seen);
      base += 32;
    }
    __syncwarp();
    if (lane == 0) {
      base_ = base;
      group_ = group;
      found_ = found;
    }
    __syncwarp();
  }

 private:
  const RowTile* tiles_;
  int count_, groups_, lo_, hi_;
  int base_ = 0, group_ = 0, found_ = 0;
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

  // Writes tile `last` to the ring. One warp calls this.
  template <int kTileRows>
  DFLASH_INLINE void find(int last, MovingRing& ring) const {
    if (threadIdx.x % 32 != 0) return;
    Moving moving{};
    if (last < tiles_.count()) {
      const int first = tiles_[last];
      moving = {first, 0, tiles_.is_full(first), false, true};
    }
    ring[last] = moving;
  }

  // Whether some row may see the key.
  DFLASH_INLINE bool has(int key) const {
    return (key >= plan_.lo[0] && key < plan_.hi[0]) || (key >= plan_.lo[1] && key < plan_.hi[1]);
  }

 private:
  TilePlan plan_;
  KeyTilesByRun<kKeys> tiles_;
};

}  // namespace dflash::DFLASH_ISA::sm80
