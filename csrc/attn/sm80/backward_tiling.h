// The shapes of the portable backward, and what the threads of a block share.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attn/masking.h"
#include "attn/scores.h"
#include "attn/sm80/backward_walks.h"
#include "attn/sm80/row_chunks.h"

namespace dflash::DFLASH_ISA::sm80 {

template <int kHeadDim_, bool kOfKeys_>
struct BackwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kOfKeys = kOfKeys_;  // whether keys are still and rows move, or the reverse
  static constexpr int kThreads = 256;

  // Warps share a head dimension above 128: each sums the scores over its own columns, and computes its own columns of
  // the gradients.
  static constexpr int kWarpDim = std::min(kHeadDim, 128);
  static constexpr int kParts = kHeadDim / kWarpDim;
  static constexpr int kStill = 16 * (kThreads / 32 / kParts);
  static constexpr int kTileRows = static_cast<int>(backward_tile_rows(kHeadDim));
  static constexpr int kMoving = kOfKeys ? kTileRows : kHeadDim <= 128 ? 64 : kHeadDim == 256 ? 32 : 16;
  static constexpr int kWidth = kHeadDim == 64 || !kOfKeys ? std::min(kMoving, 32) : 16;  // of the moving, at a time

  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kMovingBytes = kMoving * kRowBytes;  // of one of the two moving tensors
  static constexpr int kTileBytes = std::max(4 * kMovingBytes, kStill * kRowBytes);
};

// What the host computes for the kernels.
struct BackwardLaunch {
  int fold_bits;
  // Rows begin at multiples of 16 bytes.
  bool q_aligned, k_aligned, v_aligned, grad_out_aligned, grad_q_aligned, grad_k_aligned, grad_v_aligned;
};

template <class Tile>
using BackwardWalk = std::conditional_t<Tile::kOfKeys, RowTiles, KeyTilesOfRows<Tile::kMoving>>;

// Registers are scarce, so everything that is not used in the inner loop lies in shared memory.
template <class Tile>
struct BackwardShared {
  alignas(128) uint8_t tiles[Tile::kTileBytes];  // two stages of what moves; before and after, what is still
  Scores scores;
  BackwardWalk<Tile> walk;
  Moving moving[3];  // the current tile, the one whose copy is in flight, and the one after it
  // Of the rows, whether they move or are still.
  alignas(16) float stats[2][2 * (Tile::kOfKeys ? Tile::kMoving : 0)];  // LSEs, then deltas
  RowKeys keys[Tile::kOfKeys ? 2 : 1][Tile::kOfKeys ? Tile::kMoving : Tile::kStill];
  float4 partials[Tile::kParts == 1 ? 0 : Tile::kThreads * Tile::kMoving / 4];  // scores over a part of the columns
};

}  // namespace dflash::DFLASH_ISA::sm80
