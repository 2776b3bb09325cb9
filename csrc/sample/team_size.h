// How many blocks share a row, and the shape of their launch.
#pragma once

#include "common/dispatch.h"
#include "sample/row_gpu.h"

namespace dflash {

namespace device {

// Source: what the kernel reads.
template <class Source, class Team>
LaunchShape team_shape(int64_t rows, int64_t vocab, int team_size) {
  LaunchShape shape{rows * team_size, kThreads};
  if constexpr (Team::kKeepsRow) {
    shape.shared_bytes = kept_bytes<Source>(vocab, team_size);
    shape.cluster_size = team_size;
  } else {
    shape.shared_bytes = lane_maxima_bytes<Source>(vocab);
  }
  shape.overlaps_previous = Team::kOverlapsLaunches;
  return shape;
}

}  // namespace device

// Returns the size of clusters on Hopper, which is a power of 2; 1 if a block should have a row alone. Few rows are
// spread over the multiprocessors. A cluster keeps kept_rows rows at a time in shared memory, beside at most 48 KiB of
// other things.
inline int team_size(int64_t rows, int64_t vocab, DType dtype, bool has_penalties, int kept_rows, cudaStream_t stream) {
  constexpr int kLargest = 8;
  constexpr int64_t kLeastTokens = 4096, kMaxKeptBytes = kMaxSharedBytes - 48 * 1024;
  const int64_t multiprocessors = multiprocessors_of(stream);
  int size = 1;
  while (size < kLargest && rows * size * 2 <= multiprocessors && vocab >= 2 * size * kLeastTokens) size *= 2;
  const int64_t bytes = has_penalties              ? device::kept_bytes<device::PenalisedLogits>(vocab, size)
                        : dtype == DType::kFloat32 ? device::kept_bytes<device::PlainLogits<float>>(vocab, size)
                                                   : device::kept_bytes<device::PlainLogits<__half>>(vocab, size);
  return kept_rows * bytes <= kMaxKeptBytes ? size : 1;
}

}  // namespace dflash
