// Rows of queries, keys, values and gradients in shared memory, for the portable attention kernels: their layout, the
// copies from and to global memory, and the addresses of matrix fragments. Tile is a kernel's tiling: Tile::kRowBytes
// is the length of a row, Tile::kHeadDim its elements, and Tile::kThreads threads share a copy.
#pragma once

#include "attn/params.h"
#include "common/cp_async.h"
#include "common/mma.h"
#include "common/shared_memory.h"

namespace dflash::DFLASH_ISA::sm80 {

// Elements have 16 bits and travel in chunks of 16 bytes.
constexpr int kChunkSize = 8;

// The place of a chunk of a row. Chunk c of row r lies at c ^ r % 8, so that the same chunk of eight neighbouring rows
// lies in eight different groups of banks.
template <class Tile>
DFLASH_INLINE uint32_t chunk_offset(int row, int chunk) {
  return row * Tile::kRowBytes + (chunk ^ row % 8) * 16;
}

// The addresses that one lane gives to ldmatrix for pieces of 16 x 16 elements of such rows.
template <class Tile>
class Pieces {
 public:
  DFLASH_INLINE Pieces(uint32_t rows, int row, int chunk) : lane_(rows + chunk_offset<Tile>(row, chunk)) {}

  // The piece that begins at row 16 * i and column 16 * j.
  DFLASH_INLINE uint32_t operator()(int i, int j) const {
    return (lane_ ^ (j * 32 & 127)) + (j * 32 & ~127) + i * 16 * Tile::kRowBytes;
  }

 private:
  uint32_t lane_;
};

// How the threads share a copy of rows: each takes one chunk of every kStep-th row from `row` on.
template <class Tile>
struct CopyShare {
  static constexpr int kChunks = Tile::kHeadDim / kChunkSize, kStep = Tile::kThreads / kChunks;
  int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
};

// Reads a chunk that may begin at any element.
DFLASH_INLINE uint4 read_unaligned(const void* from) {
  const auto* const elements = static_cast<const uint16_t*>(from);
  const auto pair = [&](int i) { return elements[2 * i] | uint32_t(elements[2 * i + 1]) << 16; };
  return {pair(0), pair(1), pair(2), pair(3)};
}

// Starts copying kCount rows into shared memory, and commits the copies as a group. at(i) is where the thread's chunk
// of row share.row + i begins; has(i) is whether it exists. Chunks that do not exist become zeros.
template <class Tile, int kCount, class At, class Has>
DFLASH_INLINE void copy_rows(uint32_t to, bool aligned, const At& at, const Has& has) {
  using Share = CopyShare<Tile>;
  static_assert(kCount % Share::kStep == 0);
  const Share share;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += Share::kStep) {
      cp_async(to + chunk_offset<Tile>(share.row + i, share.chunk), at(i), has(i) ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kCount; i += Share::kStep) {
      write_shared(to + chunk_offset<Tile>(share.row + i, share.chunk), has(i) ? read_unaligned(at(i)) : uint4{});
    }
  }
  cp_async_commit_group();
}

// Writes kCount rows from shared memory. at(row) is where the thread's chunk of a row begins; has(row) is whether it
// exists.
template <class Tile, int kCount, class At, class Has>
DFLASH_INLINE void write_rows(const uint8_t* rows, bool aligned, const At& at, const Has& has) {
  const CopyShare<Tile> share;
  for (int row = share.row; row < kCount; row += share.kStep) {
    if (!has(row)) continue;
    const auto chunk = *reinterpret_cast<const Chunk<uint16_t>*>(rows + chunk_offset<Tile>(row, share.chunk));
    uint16_t* const to = at(row);
    if (aligned) {
      *reinterpret_cast<Chunk<uint16_t>*>(to) = chunk;
    } else {
#pragma unroll
      for (int i = 0; i < kChunkSize; ++i) to[i] = chunk.values[i];
    }
  }
}

}  // namespace dflash::DFLASH_ISA::sm80
