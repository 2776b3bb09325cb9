// How many blocks share a row on Hopper.
#pragma once

#include "common/dispatch.h"
#include "sample/params.h"

namespace dflash {

inline int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Returns the size of clusters, which is a power of 2; 1 if a block should have a row alone. Few rows are spread over
// the multiprocessors. Filters read a row several times, so that the rows in work should stay in the L2 cache.
inline int team_size(int64_t rows, int64_t vocab, DType dtype, bool has_filters, cudaStream_t stream) {
  constexpr int kLargest = 8, kBlocksPerMultiprocessor = 2;
  constexpr int64_t kLeastTokens = 4096, kCacheBytes = 20 << 20;
  const int64_t resident = int64_t(kBlocksPerMultiprocessor) * multiprocessors_of(stream);
  const auto is_too_small = [&](int64_t size) {
    const bool is_idle = rows * size * 2 <= resident;
    const bool overflows = has_filters && std::min(rows, resident / size) * vocab * bytes_of(dtype) > kCacheBytes;
    return (is_idle || overflows) && size < kLargest && vocab >= 2 * size * kLeastTokens;
  };
  int size = 1;
  while (is_too_small(size)) size *= 2;
  return size;
}

}  // namespace dflash
