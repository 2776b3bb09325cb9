// The plan of a mask says, for every tile of query rows, which keys some of its rows see and which keys all of them
// see. One kernel makes it, and the attention of every layer reads it.
#pragma once

#include "attn/params.h"

namespace dflash {

// One tile: positions [first, first + positions) of one entry of the mask's batch, with all folded heads.
struct TilePlan {
  int32_t entry, first;
  int32_t keys;                    // how many keys the two runs hold
  int32_t lo[2], hi[2];            // two runs that hold every key that some row sees, in order; empty if lo == hi
  int32_t full_lo[2], full_hi[2];  // within each run, the keys that all rows see
  int32_t reserved;                // 0
};
constexpr int64_t kTilePlanInts = sizeof(TilePlan) / sizeof(int32_t);

struct PlanParams {
  Intervals mask;
  int64_t entries, q_len, kv_len;
  int64_t positions;  // of a tile
  int32_t* tiles;     // [entries * tiles_of(q_len, positions), kTilePlanInts], sorted: the most keys first
  int32_t* scratch;   // plan_scratch_ints(entries * tiles_of(q_len, positions))
};

constexpr int64_t tiles_of(int64_t q_len, int64_t positions) { return (q_len + positions - 1) / positions; }

// A plan of few tiles is sorted by counting the tiles that come before each. A larger plan is sorted by size classes of
// the number of keys: 8 classes an octave, class 0 for kv_len keys, the last class for less than 2^-8 of them.
constexpr int64_t kFewTiles = 1024;
constexpr int kSizeClasses = 64;
constexpr int64_t kMaxPlanBlocks = 128;  // of a launch that sorts by size class

// The scratch memory holds the plan before it is sorted, and how many tiles of each class every block has.
constexpr int64_t plan_scratch_ints(int64_t tiles) {
  return tiles * kTilePlanInts + (tiles > kFewTiles ? kMaxPlanBlocks * kSizeClasses : 0);
}

// GQA packing: how many query heads of one key head are folded into the rows of a tile. Row r stands at position r /
// fold in head r % fold.
inline int64_t fold_of(int64_t heads, int64_t kv_heads) {
  const int64_t group = heads / kv_heads;
  int64_t fold = 1;
  while (fold < 64 && group % (2 * fold) == 0) fold *= 2;
  return fold;
}

// The rows of a tile, folded heads included, of the portable kernel and of the Hopper kernel.
constexpr int64_t tile_rows(int64_t head_dim) { return head_dim <= 256 ? 128 : 64; }
constexpr int64_t hopper_tile_rows(int64_t head_dim) { return head_dim <= 64 ? 256 : head_dim <= 256 ? 128 : 64; }

}  // namespace dflash
