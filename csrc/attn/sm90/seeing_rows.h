// How the Hopper backward finds the tiles of rows that see a tile of keys.
#pragma once

#include "attn/tile_sight.h"

namespace dflash::DFLASH_ISA::sm90 {

// A tile of rows that sees some of an item's keys.
struct SeeingRows {
  int tile, group;  // the head group is counted from the key head's first
  bool is_here;     // this lane holds the tile's entry of the table, and knows what it sees
  bool is_last;     // of the item
};

// Finds the tiles of rows of an item, head group by head group, in the order of rows. All lanes of a warp call this,
// and visit(rows, sight) for each.
template <int kKeys, class Visit>
DFLASH_INLINE void find_seeing_rows(const BackwardParams& p, const BackwardItem& item, const Visit& visit) {
  if (item.begin == item.end) return;
  const int count = static_cast<int>(p.row_tiles), lane = threadIdx.x % 32;
  int group = item.begin / item.per_group;
  int found = -(item.begin % item.per_group);  // negative: what belongs to the block before
  for (;; ++group) {
#pragma unroll 1
    for (int base = 0; base < count; base += 32) {
      const int lo = item.key_tile * kKeys;
      TileSight sight;
      if (base + lane < count) sight = TileSight(p.tiles[item.entry * p.row_tiles + base + lane], lo, lo + kKeys);
#pragma unroll 1
      for (uint32_t seen = __ballot_sync(~0u, sight.is_seen); seen != 0; seen &= seen - 1) {
        if (found++ < 0) continue;
        const SeeingRows rows{base + lane, group, lane == __ffs(seen) - 1, found == item.end - item.begin};
        visit(rows, sight);
        if (rows.is_last) return;
      }
    }
  }
}

}  // namespace dflash::DFLASH_ISA::sm90
