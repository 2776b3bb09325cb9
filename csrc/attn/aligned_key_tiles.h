// One of three walks over a tile's two runs of keys. Here tiles of keys begin at multiples of their length, counted
// from key 0, and a tile that both runs touch is visited once. Both decode kernels use it: pages of a cache are then
// whole boxes, and exact mode cuts a row's keys at the same places under every mask. (sm90/packed_key_tiles.h lays the
// runs end to end; sm80/key_tiles_by_run.h begins a new tile with each run.)
#pragma once

#include "attn/plan.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA {

// The walk visits `count` tiles. The seam is where the second run begins: visit i is of tile first + i before the seam,
// and of tile first + jump + i from the seam on.
struct AlignedKeyTiles {
  int first, seam, jump, count;

  AlignedKeyTiles() = default;

  // tile_of(key) is the tile of `length` keys that holds a key.
  template <class TileOf>
  DFLASH_INLINE AlignedKeyTiles(const TilePlan& plan, int length, TileOf tile_of) {
    const auto end_of = [&](int run) { return plan.lo[run] < plan.hi[run] ? tile_of(plan.hi[run] + length - 1) : 0; };
    first = tile_of(plan.lo[0]);
    seam = max(end_of(0) - first, 0);
    const int second = max(tile_of(plan.lo[1]), first + seam);
    jump = second - first - seam;
    count = seam + max(end_of(1) - second, 0);
  }

  DFLASH_INLINE int operator[](int i) const { return first + i + (i < seam ? 0 : jump); }
};

}  // namespace dflash::DFLASH_ISA
