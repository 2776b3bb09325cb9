// How many blocks share a row on Hopper, and whether they keep it in their shared memory.
#pragma once

#include "common/dispatch.h"

namespace dflash {

struct TeamShape {
  int size;            // of clusters, a power of 2; 1: a block has a row alone
  int resident_bytes;  // of a block's part of the row; 0: it is not kept
};

// What a block of a team keeps of a row. Rows are cut into tiles of whole steps of 4096 bytes, 512 tiles at most.
inline int64_t part_bytes(int64_t row_bytes, int team_size) {
  constexpr int64_t kStepBytes = 4096, kMaxTiles = 512;
  const int64_t tile_bytes = (row_bytes + kStepBytes * kMaxTiles - 1) / (kStepBytes * kMaxTiles) * kStepBytes;
  const int64_t tiles = (row_bytes + tile_bytes - 1) / tile_bytes;
  return (tiles + team_size - 1) / team_size * tile_bytes;
}

// Few rows are spread over the multiprocessors. rereads: the row is read several times, as filters do. Then long rows
// are spread until they fit into the team's shared memory, because those of all blocks would not fit into the L2 cache.
inline TeamShape team_shape(int64_t rows, int64_t vocab, int64_t row_bytes, bool rereads, cudaStream_t stream) {
  constexpr int kLargest = 8;
  constexpr int64_t kLeastTokens = 4096, kMostPartBytes = 176 << 10, kLongRow = 96 << 10;
  const int64_t multiprocessors = multiprocessors_of(stream);
  TeamShape shape{1, 0};
  while (shape.size < kLargest && rows * shape.size * 2 <= multiprocessors && vocab >= 2 * shape.size * kLeastTokens) {
    shape.size *= 2;
  }
  if (!rereads || (shape.size == 1 && row_bytes < kLongRow) || part_bytes(row_bytes, kLargest) > kMostPartBytes) {
    return shape;
  }
  if (shape.size == 1) shape.size = 2;
  while (part_bytes(row_bytes, shape.size) > kMostPartBytes) shape.size *= 2;
  shape.resident_bytes = static_cast<int>(part_bytes(row_bytes, shape.size));
  return shape;
}

inline int64_t row_bytes_of(DType dtype, int64_t vocab) { return vocab * (dtype == DType::kFloat32 ? 4 : 2); }

}  // namespace dflash
