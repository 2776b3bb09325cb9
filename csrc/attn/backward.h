// What the kernels of block_attn's backward on a GPU share.
//
// With P the probabilities and dP = dO V^T,
//   dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE,   dQ = dS K,   dK = dS^T Q,   dV = P^T dO.
//
// Rows are folded as in the forward (plan.h): row r of a head group stands at position r / fold in query head group *
// fold + r % fold. They are cut into tiles of `tile_rows`, in natural order. backward_prepare writes a table with the
// keys that each tile and each row sees, and the statistics of the rows. A block that holds keys finds in it the tiles
// of rows that see them.
#pragma once

#include "attn/plan.h"

namespace dflash {

// The keys that the positions of a tile of rows see, as two runs like those of a TilePlan.
struct alignas(16) RowTile {
  int32_t lo[2], hi[2];            // hold every key that some row sees; empty if lo == hi
  int32_t full_lo[2], full_hi[2];  // the keys that all rows see
  int32_t has_empty;               // some row sees nothing, and its values must not reach any key
};

// The keys that one row sees, with the fields of RowBounds. Rows after the last see nothing.
struct alignas(16) RowKeys {
  int32_t ctx_lo, blk_lo;
  uint32_t ctx_len, blk_len;
};

// Hopper only: what becomes of a block's dK and dV of a tile of keys. The parts of a split tile take turns: the first
// is stored as float32, others are added to it, and the final part rounds the sum of all.
enum class BackwardPart : int8_t { kWhole, kFirst, kMiddle, kFinal };

// Hopper only: a block's work on one tile of keys.
struct alignas(16) BackwardItem {
  int32_t batch, entry, kv_head, key_tile;  // key_tile is -1 when there is no more work
  int32_t begin, end;  // of the tiles of rows that see the keys, counted over the head groups
  int32_t per_group;   // how many such tiles one head group has
  int16_t turn;        // how many other parts must be there before this one
  BackwardPart part;
  int8_t is_last;      // the block has no more items in this section
};

// Hopper only: which of 32 consecutive tiles of rows see a tile of keys, and how many of the tiles before them do.
struct alignas(8) SeenBy {
  uint32_t bits;
  int32_t before;
};

struct BackwardParams : AttentionBackwardParams {
  int64_t entries;    // of the mask: 1 or batch
  int64_t tile_rows;  // of a tile, heads folded in
  int64_t fold;
  int64_t row_tiles;  // tiles_of(q_len, tile_rows / fold)
  RowTile* tiles;     // [entries, row_tiles]
  RowKeys* keys;      // [entries, row_tiles * tile_rows / fold]
  // [batch, heads / fold, row_tiles, 2, tile_rows]: for each tile the rows' LSEs in base 2, then their deltas. The LSE
  // of a row that sees nothing is inf, so that its probabilities are zeros.
  float* stats;

  // float32 sums of dQ that blocks add to, [batch, heads / fold, row_tiles, tile_rows * tile_dim], each tile in the
  // order of a kernel's registers. Null where the portable kernel makes two passes (portable_backward_adds).
  float* grad_q_sums;
  int64_t tile_dim;
  // Whether sums begin as zeros, to which blocks add in any order. Otherwise the first that comes stores its own.
  bool adds_to_zeros;

  // Hopper only. Key heads are taken in sections, and blocks take equal shares of a section's work, so that several
  // blocks may share a tile of keys.
  int64_t tile_keys, key_tiles, blocks;  // blocks: clusters if head_dim is above 128
  int64_t sections, section_heads;  // section_heads: the key heads of a section, over all batch entries
  int32_t* seen;         // [entries, key_tiles + 1]: how many tiles of rows see the key tiles before
  BackwardItem* items;   // [batch * kv_heads * key_tiles + sections * blocks]
  int32_t* first_items;  // [sections, blocks]: -1 for none; a block's other items of the section follow its first
  // In the order of registers: dK, then dV, of split tiles only.
  float* grad_key_sums;  // [batch * kv_heads * key_tiles, 2, tile_keys * tile_dim]
  int32_t* is_split;     // [batch * kv_heads * key_tiles], if sums begin as zeros: whether blocks share the tile

  // If the first stores, or calls are deterministic: how far the sums are (sm90/turns.h).
  int32_t* rows_added;  // [batch, heads / fold, row_tiles, blocks of a cluster]
  int32_t* keys_added;  // [batch * kv_heads * key_tiles, 4], for the parts that warpgroups add
  int32_t* sections_added;  // [sections]: how many blocks have added all their dQ

  // Deterministic calls: the turns of additions to a tile of rows (backward_deal_sm90.cu).
  bool is_deterministic;
  SeenBy* seen_by;  // [entries, key_tiles, tiles_of(row_tiles, 32)]
  uint16_t* turns;  // [batch, heads / fold, row_tiles, key_tiles]
};

// A tile of rows holds at least one position.
constexpr int64_t backward_fold_of(int64_t heads, int64_t kv_heads) {
  const int64_t group = heads / kv_heads;
  int64_t fold = 1;
  while (fold < 16 && group % (2 * fold) == 0) fold *= 2;
  return fold;
}

// The rows of a tile in the table of the portable kernel, and of a tile that moves past its keys.
constexpr int64_t backward_tile_rows(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 256 ? 32 : 16; }

// Whether the portable kernel makes one pass, in which it adds to sums of dQ, instead of two.
constexpr bool portable_backward_adds(int64_t head_dim, bool deterministic) {
  return !deterministic && head_dim <= 128;
}

// The rows of a tile of the Hopper kernels, and the keys of one.
constexpr int64_t hopper_backward_rows(int64_t head_dim) { return head_dim <= 64 ? 128 : 64; }
constexpr int64_t hopper_backward_keys(int64_t head_dim) { return head_dim <= 256 ? 128 : 64; }

// The blocks that share a tile of keys: a cluster above head_dim 128.
constexpr int64_t hopper_backward_cluster(int64_t head_dim) { return head_dim <= 128 ? 1 : 2; }

// With more keys the turns of deterministic calls would take too much memory.
constexpr int64_t kMaxDeterministicKeys = 1 << 18;

// What it costs the Hopper kernel to begin and end a tile of keys, in tiles of rows.
constexpr int64_t kHopperBackwardOverhead = 2;

}  // namespace dflash
