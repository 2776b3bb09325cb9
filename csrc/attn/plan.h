// The plan of a mask: for every tile of query rows, which keys its rows see at all and which they see in common. One
// kernel makes it; every layer's attention reads it.
#pragma once

#include "attn/params.h"

namespace dflash {

// The tile's rows are the positions [first, first + positions) of one entry of the mask's batch.
struct TilePlan {
  int32_t entry, first;
  int32_t keys;                    // how many keys the two runs hold
  int32_t lo[2], hi[2];            // runs that hold every key that some row sees; in order, empty where lo == hi
  int32_t full_lo[2], full_hi[2];  // each within a run: all rows see all of it
  int32_t reserved;
};
constexpr int64_t kTilePlanInts = sizeof(TilePlan) / sizeof(int32_t);

struct PlanParams {
  Intervals mask;
  int64_t entries, q_len, kv_len;
  int64_t positions;  // of a tile
  int32_t* tiles;     // [entries * tiles_of(q_len, positions), kTilePlanInts]: those with the most keys first
  int32_t* scratch;   // plan_scratch_ints(entries * tiles_of(q_len, positions))
};

constexpr int64_t tiles_of(int64_t q_len, int64_t positions) { return (q_len + positions - 1) / positions; }

// A plan of few tiles is sorted by counting, for each tile, those that come before it. A larger one is sorted by size
// class of the number of keys: 8 classes an octave, 0 for the most keys.
constexpr int64_t kFewTiles = 1024;
constexpr int kSizeClasses = 128;
constexpr int64_t kMaxPlanBlocks = 128;  // that sort by class

// The plan before it is sorted, and how many tiles of each class every block has.
constexpr int64_t plan_scratch_ints(int64_t tiles) {
  return tiles * kTilePlanInts + (tiles > kFewTiles ? kMaxPlanBlocks * kSizeClasses : 0);
}

// How many query heads of one key head share a tile: row r of it stands at position r / fold in head r % fold.
inline int64_t fold_of(int64_t heads, int64_t kv_heads) {
  const int64_t group = heads / kv_heads;
  int64_t fold = 1;
  while (fold < 64 && group % (2 * fold) == 0) fold *= 2;
  return fold;
}

// The rows of a tile, heads folded in: of the portable kernels, and of Hopper's.
constexpr int64_t tile_rows(int64_t head_dim) { return head_dim <= 256 ? 128 : 64; }
constexpr int64_t hopper_tile_rows(int64_t head_dim) { return head_dim <= 64 ? 256 : head_dim <= 256 ? 128 : 64; }

}  // namespace dflash
