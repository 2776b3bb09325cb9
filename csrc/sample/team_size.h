// How many blocks share a row, and the shape of their launch.
#pragma once

#include <algorithm>
#include <array>

#include "common/dispatch.h"
#include "common/gpu.h"
#include "common/launch.h"
#include "sample/row_gpu.h"

namespace dflash {

namespace device {

// It is never launched: it stands for a kernel whose block takes most of a multiprocessor.
template <class = void>
__global__ void __launch_bounds__(kThreads, 1) occupies_multiprocessor() {}

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

// Returns how many clusters of each size are resident at once, where a block has a multiprocessor alone: clusters lie in
// parts of a GPU which have different numbers of multiprocessors. 0 if there are no clusters of that size.
inline std::array<int, device::kLargestTeam + 1> resident_clusters(int multiprocessors, cudaStream_t stream) {
  return once_per_device(multiprocessors, [&] {
    constexpr int kSharedBytes = kMaxSharedBytes * 2 / 3;
    const auto kernel = device::occupies_multiprocessor<>;
    std::array<int, device::kLargestTeam + 1> clusters{};
    for (int size = 2; size <= device::kLargestTeam; ++size) {
      LaunchShape shape{size, device::kThreads};
      shape.shared_bytes = kSharedBytes;
      shape.cluster_size = size;
      clusters[size] = count_resident_clusters(kernel, shape, stream);
    }
    return clusters;
  });
}

// Returns the size of clusters on Hopper; 1 if a block should have a row alone. Few rows are spread over the
// multiprocessors, so that the clusters of all are resident at once. A cluster keeps kept_rows rows at a time in shared
// memory, beside at most 48 KiB of other things.
inline int team_size(int64_t rows, int64_t vocab, DType dtype, bool has_penalties, int kept_rows, cudaStream_t stream) {
  constexpr int64_t kLeastTokens = 4096, kMaxKeptBytes = kMaxSharedBytes - 48 * 1024;
  const int multiprocessors = multiprocessors_of(stream);
  const auto resident = resident_clusters(multiprocessors, stream);
  for (int size = device::kLargestTeam; size > 1; --size) {
    if (rows > std::min(resident[size], multiprocessors / size)) continue;
    const int64_t bytes = has_penalties              ? device::kept_bytes<device::PenalisedLogits>(vocab, size)
                          : dtype == DType::kFloat32 ? device::kept_bytes<device::PlainLogits<float>>(vocab, size)
                                                     : device::kept_bytes<device::PlainLogits<__half>>(vocab, size);
    if (vocab >= size * kLeastTokens && kept_rows * bytes <= kMaxKeptBytes) return size;
  }
  return 1;
}

}  // namespace dflash
