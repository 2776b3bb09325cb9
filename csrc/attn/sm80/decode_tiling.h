// The shapes of the portable decode kernel, and what the threads of a block share.
#pragma once

#include "attn/scores.h"
#include "attn/sm80/decode_work.h"
#include "attn/sm80/row_chunks.h"

namespace dflash::DFLASH_ISA::sm80 {

constexpr int kMaxStages = 4;

// Two warps share 16 rows where one could not hold their output: each computes half of the columns.
template <int kDim>
struct DecodeTiling {
  static constexpr int kHeadDim = kDim;
  static constexpr int kKeys = kDim <= 128 ? 64 : 8192 / kDim;
  static constexpr int kColumnWarps = kDim <= 256 ? 1 : 2;
  static constexpr int kColumns = kDim / kColumnWarps;
  static constexpr int kWarps = kDecodeRows / 16 * kColumnWarps, kThreads = kWarps * 32;
  static constexpr int kBlocks = kDim <= 64 ? 3 : kDim <= 256 ? 2 : 1;  // of a multiprocessor
  static constexpr int kChunks = kDim / kChunkSize;                     // of a row
  static constexpr int kRowBytes = kDim * 2, kQueryBytes = kDecodeRows * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes, kStageBytes = 2 * kKeyBytes;  // keys, then values
};

// What a block keeps in shared memory beside queries, keys and values.
template <class Tile>
struct DecodeShared {
  Itinerary<Tile::kKeys, kMaxStages + 1> steps;  // the steps whose tiles are in the ring, and one more
  RowPlace places[kDecodeRows];
  WorkRange range;
  Scores scores;
};

}  // namespace dflash::DFLASH_ISA::sm80
