// What a tile of rows sees of a tile of keys, for the kernels of the backward on a GPU.
#pragma once

#include "attn/backward.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA {

// What a tile of rows sees of the keys [lo, hi).
struct TileSight {
  bool is_seen = false;    // some row may see some key
  bool is_full = false;    // every row sees every key
  bool has_empty = false;  // some row sees no key at all, neither here nor elsewhere

  TileSight() = default;
  DFLASH_INLINE TileSight(const RowTile& tile, int lo, int hi) : has_empty(tile.has_empty) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      is_seen |= (tile.lo[i] < hi) & (tile.hi[i] > lo);
      is_full |= (tile.full_lo[i] <= lo) & (tile.full_hi[i] >= hi);
    }
  }
};

}  // namespace dflash::DFLASH_ISA
