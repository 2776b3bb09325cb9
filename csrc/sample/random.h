// Random numbers as a function of (seed, stream, row, column). They apply SplitMix64's mixing to counters and keep no
// state.
// dflash_ext/ops/random.py has the same numbers in Python.
#pragma once

#include "sample/params.h"
#ifdef __CUDACC__
#include "common/device.h"
#else
#include "common/simd.h"
#endif

namespace dflash::DFLASH_ISA {

// A draft and its verification draw from different streams, so that one seed can serve both.
enum Stream : uint64_t { kSampleStream = 1, kVerifyStream = 2 };

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;  // 2^64 over the golden ratio

DFLASH_INLINE uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Returns a number in [0, 1). A row with a seed of its own counts as the first row of that seed, wherever it stands.
DFLASH_INLINE double uniform_of(const SeedParams& seed, Stream stream, int64_t row, int64_t column) {
  const uint64_t own = seed.values[seed.per_row ? row : 0], index = seed.per_row ? 0 : row;
  const uint64_t key = mix_bits(mix_bits(mix_bits(own + kGolden) + stream) + index * kGolden);
  return double(mix_bits(key + (column + 1) * kGolden) >> 11) * 0x1p-53;
}

}  // namespace dflash::DFLASH_ISA
