// The tiles of a row of logits on a GPU: their sizes, and what is kept of each in shared memory.
#pragma once

#include "sample/logits_gpu.h"

namespace dflash::DFLASH_ISA {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kLoads = 8;  // chunks of 16 bytes that a lane loads at once
constexpr int kMaxTiles = 512;

// Tokens that a warp loads at once.
template <class Source>
constexpr int kStep = 32 * kLoads * Source::kSize;

template <class Source>
constexpr uint32_t tile_size_of(uint32_t vocab) {
  constexpr uint32_t kLargestStep = kStep<Source> * kMaxTiles;
  return (vocab + kLargestStep - 1) / kLargestStep * kStep<Source>;
}

// The tiles of a block.
template <class Source>
constexpr int share_of(uint32_t vocab, int team_size) {
  const uint32_t tile_size = tile_size_of<Source>(vocab), tiles = (vocab + tile_size - 1) / tile_size;
  return (tiles + team_size - 1) / team_size;
}

// Bytes of dynamic shared memory in which a team that keeps its row has a block's share of it.
template <class Source>
constexpr int64_t kept_bytes(uint32_t vocab, int team_size) {
  const int64_t tokens = share_of<Source>(vocab, team_size) * int64_t(tile_size_of<Source>(vocab));
  return tokens / Source::kSize * sizeof(typename Source::Values);
}

// The shared memory of a block that reads its row again: it has the largest logit of each lane in each tile.
template <class Source>
constexpr int64_t lane_maxima_bytes(uint32_t vocab) {
  return share_of<Source>(vocab, 1) * 32 * sizeof(__nv_bfloat16);
}

// Integers in the order of floats.
DFLASH_INLINE int ordered_bits(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
DFLASH_INLINE float from_ordered_bits(int bits) { return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff)); }
DFLASH_INLINE float warp_max(float x) { return from_ordered_bits(__reduce_max_sync(~0u, ordered_bits(x))); }
DFLASH_INLINE float warp_min(float x) { return from_ordered_bits(__reduce_min_sync(~0u, ordered_bits(x))); }

// Returns the first lane of which the first holds, or else the last of which the second holds.
DFLASH_INLINE int first_or_last(bool first, bool last) {
  const unsigned firsts = __ballot_sync(~0u, first), lasts = __ballot_sync(~0u, last);
  return firsts ? __ffs(firsts) - 1 : 31 - __clz(lasts);
}

// Calls f(t, value_of(t)) for t = begin, begin + kStride, ... Values are loaded four at a time.
template <int kStride, class ValueOf, class F>
DFLASH_INLINE void for_each_tile(int begin, int end, const ValueOf& value_of, F&& f) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (; begin < end; begin += kAtOnce * kStride) {
    float values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = value_of(min(begin + i * kStride, end - 1));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i * kStride < end) f(begin + i * kStride, values[i]);
    }
  }
}

// The sum of e = 2^d, d = (x - the row's maximum) * rate, and the sum of e * d, over a tile or a row.
struct Sums {
  float e, e_exponent;
  DFLASH_INLINE float entropy() const { return logf(e) - kLn2 * e_exponent / e; }  // nats
};

struct Tile {
  Best best;
  float e, e_exponent;  // as Sums, but relative to the tile's own maximum
};

// Shared memory of every block of a team. What belongs to a tile is written into that of all blocks by the warp that
// has the tile.
struct RowMemory {
  Tile tiles[kMaxTiles];
  Sums kept[kMaxTiles];  // of the tiles, after the filters
  // Of this block's warps, in the tile of a draw or of the argmax.
  float group_sums[kWarps];
  unsigned found[kWarps];
};

// Starts to bring the logits of tokens [begin, end) into the L2 cache. A whole block of kThreads calls this. It may
// precede Team::wait_for_inputs, because that cache always has what was written last.
template <class Raw>
DFLASH_INLINE void prefetch_tokens(const Raw& logits, uint32_t begin, uint32_t end) {
  constexpr int kLine = 128;  // bytes
  const char* const first = static_cast<const char*>(logits.address(begin));
  const void* const last = logits.address(min(logits.vocab, end));
  for (const char* line = first + threadIdx.x * kLine; line < last; line += kThreads * kLine) prefetch_l2(line);
}

// The same for the first tiles of a block.
template <class Source, class Team, class Raw>
DFLASH_INLINE void prefetch_first_tiles(const Raw& logits) {
  const uint32_t vocab = logits.vocab, tile_size = tile_size_of<Source>(vocab);
  const uint32_t share = share_of<Source>(vocab, Team::size()), begin = Team::rank() * share * tile_size;
  if (begin < vocab) prefetch_tokens(logits, begin, begin + min(share, uint32_t(kWarps)) * tile_size);
}

}  // namespace dflash::DFLASH_ISA
