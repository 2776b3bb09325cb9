// Rows of queries, keys and values in shared memory, for the portable attention kernels: how they are laid out, copied
// there, and read as fragments of matrix products. Tile::kRowBytes is the length of a row, Tile::kThreads share a copy.
#pragma once

#include "attn/params.h"
#include "common/cp_async.h"
#include "common/mma.h"
#include "common/shared_memory.h"

namespace dflash {

// Elements have 16 bits and travel in chunks of 16 bytes.
constexpr int kChunkSize = 8;

// Whether every chunk of a tensor's rows is aligned to 16 bytes.
inline bool in_chunks(const void* data, const HeadStrides& strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         (strides.batch | strides.head | strides.row) % kChunkSize == 0;
}

namespace DFLASH_ISA {

// Rows in shared memory: chunk c of row r lies in place c ^ r % 8, so that one chunk of eight neighbouring rows is in
// eight different banks.
template <class Tile>
DFLASH_INLINE uint32_t chunk_offset(int row, int chunk) {
  return row * Tile::kRowBytes + (chunk ^ row % 8) * 16;
}

// A lane's address in the pieces of 16 x 16 elements that ldmatrix takes from such rows.
template <class Tile>
class Pieces {
 public:
  DFLASH_INLINE Pieces(uint32_t rows, int row, int chunk) : lane_(rows + chunk_offset<Tile>(row, chunk)) {}

  // The piece that begins at row 16 * i, column 16 * j.
  DFLASH_INLINE uint32_t operator()(int i, int j) const {
    return (lane_ ^ (j * 32 & 127)) + (j * 32 & ~127) + i * 16 * Tile::kRowBytes;
  }

 private:
  uint32_t lane_;
};

// How the threads share rows that are to be copied: each takes one chunk of every kStep-th row from `row` on.
template <class Tile>
struct CopyShare {
  static constexpr int kChunks = Tile::kHeadDim / kChunkSize, kStep = Tile::kThreads / kChunks;
  int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
};

DFLASH_INLINE void store_shared(uint32_t to, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// Copies kCount rows into shared memory. at(i) is where the thread's chunk of row share.row + i begins, has(i) whether
// there is such a chunk: otherwise it is zeros.
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
      uint32_t pairs[kChunkSize / 2] = {};
      if (has(i)) {
        const uint16_t* from = at(i);
#pragma unroll
        for (int k = 0; k < kChunkSize / 2; ++k) pairs[k] = from[2 * k] | uint32_t(from[2 * k + 1]) << 16;
      }
      store_shared(to + chunk_offset<Tile>(share.row + i, share.chunk), pairs);
    }
  }
  cp_async_commit_group();
}

}  // namespace DFLASH_ISA
}  // namespace dflash
