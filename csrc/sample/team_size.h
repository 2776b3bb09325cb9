// How many blocks share a row on Hopper.
#pragma once

#include "common/dispatch.h"

namespace dflash {

// Returns the size of clusters, which is a power of 2; 1 if a block should have a row alone. Few rows are spread over
// the multiprocessors.
inline int team_size(int64_t rows, int64_t vocab, cudaStream_t stream) {
  constexpr int kLargest = 8;
  constexpr int64_t kLeastTokens = 4096;
  const int64_t multiprocessors = multiprocessors_of(stream);
  int size = 1;
  while (size < kLargest && rows * size * 2 <= multiprocessors && vocab >= 2 * size * kLeastTokens) size *= 2;
  return size;
}

}  // namespace dflash
