// The shapes of the portable forward, and what the threads of a block share.
#pragma once

#include <algorithm>

#include "attn/masking.h"
#include "attn/scores.h"
#include "attn/sm80/key_tiles_by_run.h"

namespace dflash::DFLASH_ISA::sm80 {

// The shape of a tile, and how its warps share it.
template <int kHeadDim_>
struct ForwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = tile_rows(kHeadDim);
  static constexpr int kKeys = kHeadDim <= 128 ? 64 : kHeadDim == 256 ? 48 : 32;

  // A warp's outputs take at most 128 registers a thread. Up to head_dim 128 this is 32 rows, and each fragment of keys
  // and values serves two fragments of rows, which halves the reads of shared memory. Above, it is 16 rows of 256
  // columns. Two warps share a larger head dimension: each sums the scores over its own columns of q and k, and
  // computes its own columns of the output.
  static constexpr int kFragments = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kFragments;
  static constexpr int kWarpDim = std::min(kHeadDim, 256);
  static constexpr int kParts = kHeadDim / kWarpDim;
  static constexpr int kThreads = kRows / kWarpRows * kParts * 32;
  static constexpr int kMinBlocks = kHeadDim == 64 ? 3 : kHeadDim == 128 ? 2 : 1;

  // With 16 rows a warp keeps its queries in registers: reading them again for every key tile would cost more.
  static constexpr bool kKeepsQueries = kFragments == 1;

  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kKeysAt = kKeepsQueries ? 0 : kRows * kRowBytes;
  static constexpr int kValuesAt = kKeysAt + kKeys * kRowBytes;
  static constexpr int kTileBytes = std::max(kRows * kRowBytes, kValuesAt + kKeys * kRowBytes);
};

// What the host computes for the kernel.
struct ForwardLaunch {
  int fold_bits;
  int positions;                                      // of a tile
  bool q_aligned, k_aligned, v_aligned, out_aligned;  // rows begin at multiples of 16 bytes
};

// The rows of a tile: row r stands at position first + r / fold, in head `head` + r % fold.
struct TileRows {
  int64_t batch;
  int head, first, q_len, fold_bits;

  DFLASH_INLINE int position(int row) const { return first + (row >> fold_bits); }
  DFLASH_INLINE int head_of(int row) const { return head + (row & ((1 << fold_bits) - 1)); }
  DFLASH_INLINE bool has(int row) const { return position(row) < q_len; }
  DFLASH_INLINE int64_t offset(const HeadStrides& strides, int row) const {
    return batch * strides.batch + head_of(row) * strides.head + position(row) * strides.row;
  }
};

// A block's item. It lies in shared memory because registers are scarce.
template <int kKeys>
struct ForwardItem {
  TilePlan plan;
  KeyTilesByRun<kKeys> key_tiles;
  Scores scores;
  TileRows rows;
  const uint16_t *k, *v;  // the head's

  // A tile of the plan has plan_parts * repeats * head_groups items.
  DFLASH_INLINE ForwardItem(const AttentionForwardParams& p, const ForwardLaunch& launch, uint32_t index)
      : ForwardItem(p, launch, index / head_groups(p, launch), index % head_groups(p, launch)) {}

 private:
  DFLASH_INLINE ForwardItem(const AttentionForwardParams& p, const ForwardLaunch& launch, uint32_t outer,
                            uint32_t head_group)
      : ForwardItem(p, launch, outer / repeats(p), outer % repeats(p), head_group) {}

  DFLASH_INLINE ForwardItem(const AttentionForwardParams& p, const ForwardLaunch& launch, uint32_t tile,
                            uint32_t repeat, uint32_t head_group)
      : plan(reinterpret_cast<const TilePlan*>(p.plan)[tile / parts(p)]), key_tiles(plan), scores(p) {
    const int64_t batch = p.plan_entries == 1 ? repeat : plan.entry;
    const int head = head_group << launch.fold_bits;
    const int64_t kv_head = head / (static_cast<int>(p.heads) / static_cast<int>(p.kv_heads));
    const int first = plan.first + static_cast<int>(tile % parts(p)) * launch.positions;
    rows = {batch, head, first, static_cast<int>(p.q_len), launch.fold_bits};
    k = static_cast<const uint16_t*>(p.k) + batch * p.k_strides.batch + kv_head * p.k_strides.head;
    v = static_cast<const uint16_t*>(p.v) + batch * p.v_strides.batch + kv_head * p.v_strides.head;
  }

  static DFLASH_INLINE uint32_t parts(const AttentionForwardParams& p) { return p.plan_parts; }
  static DFLASH_INLINE uint32_t repeats(const AttentionForwardParams& p) { return p.plan_entries == 1 ? p.batch : 1; }
  static DFLASH_INLINE uint32_t head_groups(const AttentionForwardParams& p, const ForwardLaunch& launch) {
    return p.heads >> launch.fold_bits;
  }
};

template <class Tile>
struct ForwardShared {
  alignas(128) uint8_t tiles[Tile::kTileBytes];  // of queries, keys and values; at the end, of outputs
  ForwardItem<Tile::kKeys> item;
  RowBounds bounds[Tile::kRows];
  float4 partials[Tile::kParts == 1 ? 0 : Tile::kThreads * Tile::kKeys / 8];  // scores over a part of the columns
};

}  // namespace dflash::DFLASH_ISA::sm80
