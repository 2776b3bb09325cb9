// Batches of a lane's chunks in a tile of logits, by where they come from. Chunk c holds the logits of the tokens from
// first + c * 32 * kSize on; past the end of the row they are -inf.
#pragma once

#include "sample/logits_gpu.h"

namespace dflash::DFLASH_ISA {

// These were loaded at once.
template <class Source, int kChunks>
struct LoadedBatch {
  using Values = typename Source::Values;
  static constexpr int kCount = kChunks;
  static constexpr bool kIsLoaded = true;
  uint32_t first;
  Values chunks[kCount];

  template <class F>
  DFLASH_INLINE void for_each(F&& f) const {
#pragma unroll
    for (int c = 0; c < kCount; ++c) f(c, first + c * 32 * Source::kSize, chunks[c]);
  }
};

// Loads a chunk from shared memory, 16 bytes at once. The compiler would load every logit alone where it is used.
template <class Values>
DFLASH_INLINE Values load_kept(const Values* chunk) {
  static_assert(sizeof(Values) % sizeof(uint4) == 0);
  Values own;
#pragma unroll
  for (int i = 0; i < int(sizeof(Values) / sizeof(uint4)); ++i) {
    const uint4 part = reinterpret_cast<const uint4*>(chunk)[i];
    reinterpret_cast<uint4*>(&own)[i] = part;
  }
  return own;
}

// These come one by one from where the team keeps the row. The code of such a loop stays in the instruction cache; a
// few rows would wait for the code of an unrolled one.
template <class Source, int kChunks>
struct KeptBatch {
  using Values = typename Source::Values;
  static constexpr int kCount = kChunks;
  static constexpr bool kIsLoaded = false;
  uint32_t first;
  const Values* chunks;

  template <class F>
  DFLASH_INLINE void for_each(F&& f) const {
#pragma unroll 1
    for (int c = 0; c < kCount; ++c) {
      const Values chunk = load_kept(chunks + c * 32);
      f(c, first + c * 32 * Source::kSize, chunk);
    }
  }
};

// These are loaded one by one: in the last tile, and in rows that are not aligned.
template <class Source, int kChunks>
struct Batch {
  using Values = typename Source::Values;
  static constexpr int kCount = kChunks;
  static constexpr bool kIsLoaded = false;
  uint32_t first;
  Source logits;

  template <class F>
  DFLASH_INLINE void for_each(F&& f) const {
#pragma unroll 1
    for (int c = 0; c < kCount; ++c) {
      const uint32_t token = first + c * 32 * Source::kSize;
      f(c, token, logits.at(token));
    }
  }
};

// Calls f(batch) for this lane's chunks of the tokens [begin, begin + 32 * kCount * kSize). Chunks that are loaded at once
// are as they lie in memory (Source::Raw).
template <int kCount, class Source, class F>
DFLASH_INLINE void with_batch(const Source& logits, uint32_t begin, F&& f) {
  constexpr uint32_t kTokens = 32 * kCount * Source::kSize;
  const uint32_t first = begin + lane_id() * Source::kSize;
  if constexpr (Source::kIsPlain) {
    if (logits.is_whole(begin + kTokens)) {
      LoadedBatch<typename Source::Raw, kCount> batch{first};
#pragma unroll
      for (int c = 0; c < kCount; ++c) batch.chunks[c] = logits.in_memory().load_whole(first + c * 32 * Source::kSize);
      return f(batch);
    }
  }
  f(Batch<Source, kCount>{first, logits.within(begin, begin + kTokens)});
}

}  // namespace dflash::DFLASH_ISA
