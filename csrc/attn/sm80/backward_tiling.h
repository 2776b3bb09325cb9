// The shapes of the portable backward, and what the threads of a block share.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attn/masking.h"
#include "attn/scores.h"
#include "attn/sm80/backward_walks.h"
#include "attn/sm80/row_chunks.h"

namespace dflash::DFLASH_ISA::sm80 {

// What a pass computes: dK and dV, while keys are still and rows move; dK, dV, and dQ by additions to sums in global
// memory; or dQ, while rows are still and keys move.
enum class BackwardOf { kKeys, kAll, kQueries };

template <int kHeadDim_, BackwardOf kOf>
struct BackwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kOfKeys = kOf != BackwardOf::kQueries, kAddsGradQ = kOf == BackwardOf::kAll;
  static constexpr int kThreads = 256;

  // Warps share a head dimension above 128: each sums the scores over its own columns, and computes its own columns of
  // the gradients.
  static constexpr int kWarpDim = std::min(kHeadDim, 128);
  static constexpr int kParts = kHeadDim / kWarpDim;
  static constexpr int kStill = 16 * (kThreads / 32 / kParts);
  static constexpr int kTileRows = static_cast<int>(backward_tile_rows(kHeadDim));
  static constexpr int kMoving = kOfKeys ? kTileRows : kHeadDim <= 128 ? 64 : kHeadDim == 256 ? 32 : 16;
  // Of the moving, at a time. If keys lie in shared memory for dQ, scores read them from there as well, which leaves
  // registers for more rows.
  static constexpr int kWidth = kHeadDim == 64 || !kOfKeys || kAddsGradQ ? std::min(kMoving, 32) : 16;

  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kMovingBytes = kMoving * kRowBytes;  // of one of the two moving tensors
  static constexpr int kTileBytes = std::max(4 * kMovingBytes, kStill * kRowBytes);

  // Of dQ: a warp sums 16 rows and 32 columns of a moving tile. The gradients of the scores lie in shared memory,
  // [keys, rows], padded so that eight neighbouring keys lie in different banks.
  static constexpr int kGradQColumns = 32, kScoresPitch = 2 * kMoving + 16;
  static_assert(!kAddsGradQ || (kMoving / 16) * (kHeadDim / kGradQColumns) == kThreads / 32);
};

// Where a warp's accumulators of dQ lie in the sums of a tile of rows: 16 bytes of a thread after those of the lane
// before it.
template <class Tile>
DFLASH_INLINE int64_t grad_q_place(int warp, int j, int lane) {
  return ((warp * (Tile::kGradQColumns / 8) + j) * 32 + lane) * 4;
}

// What the host computes for the kernels.
struct BackwardLaunch {
  int fold_bits;
  int groups;  // of heads; a group's heads share a tile of rows
  int groups_of_key_head;
  // Whether rows begin at multiples of 16 bytes. A bool would take a register, because it is loaded as a byte.
  int q_aligned, k_aligned, v_aligned, grad_out_aligned, grad_q_aligned, grad_k_aligned, grad_v_aligned;
};

template <class Tile>
using BackwardWalk = std::conditional_t<Tile::kOfKeys, RowTiles, KeyTilesOfRows<Tile::kMoving>>;

// Registers are scarce, so everything that is not used in the inner loop lies in shared memory.
template <class Tile>
struct BackwardShared {
  alignas(128) uint8_t tiles[Tile::kTileBytes];  // two stages of what moves; before and after, what is still
  Scores scores;
  BackwardWalk<Tile> walk;
  MovingRing moving;
  // Of the rows, whether they move or are still.
  alignas(16) float stats[2][2 * (Tile::kOfKeys ? Tile::kMoving : 0)];  // LSEs, then deltas
  RowKeys keys[Tile::kOfKeys ? 2 : 1][Tile::kOfKeys ? Tile::kMoving : Tile::kStill];
  alignas(128) uint8_t still_keys[Tile::kAddsGradQ ? Tile::kStill * Tile::kRowBytes : 0];
  alignas(16) uint8_t grad_s[2][Tile::kAddsGradQ ? Tile::kStill * Tile::kScoresPitch : 0];
  float4 partials[Tile::kParts == 1 ? 0 : Tile::kThreads * Tile::kMoving / 4];  // scores over a part of the columns
};

}  // namespace dflash::DFLASH_ISA::sm80
