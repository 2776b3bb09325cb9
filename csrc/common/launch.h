// How all families launch their kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "common/gpu.h"

namespace dflash {

// Makes the CUDA calls of one launch, and returns null or CUDA's message. The result belongs to this launch alone: an
// error that an earlier call left in the runtime is cleared first, and no error is left for the next call.
template <class Calls>
const char* checked_launch(Calls&& calls) {
  cudaGetLastError();
  const cudaError_t status = calls();
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The most shared memory, static and dynamic, that a block may have on Hopper, and on compute capability 8.6 and 8.9.
// The latter is the limit of portable kernels, so that one set of tiles serves all GPUs.
constexpr int kMaxSharedBytes = 227 * 1024, kMaxPortableSharedBytes = 99 * 1024;

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;            // dynamic shared memory of a block
  int cluster_size = 0;            // blocks of a cluster; 0: no clusters
  bool is_cooperative = false;     // all blocks are resident at once, so that they may wait for each other
  bool overlaps_previous = false;  // may start before the stream's previous kernel has ended
};

// The shape in the form that the runtime takes.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config_.blockDim = dim3(shape.threads);
    config_.dynamicSmemBytes = shape.shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (shape.cluster_size > 0) {
      add(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(shape.cluster_size), 1, 1};
    }
    if (shape.is_cooperative) add(cudaLaunchAttributeCooperative).cooperative = 1;
    if (shape.overlaps_previous) {
      add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }

  cudaLaunchAttribute attributes_[3]{};
  cudaLaunchConfig_t config_{};
};

// Raises the kernel's limit of dynamic shared memory.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Launches a kernel of any kind. Call this within checked_launch.
template <class... Params, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                          Arguments&&... arguments) {
  constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
  if (shape.blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;  // instead of dropping the upper bits
  if (shape.shared_bytes > 0) {
    const cudaError_t status = allow_shared_memory(kernel, shape.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  return cudaLaunchKernelEx(LaunchConfig(shape, stream).get(), kernel, std::forward<Arguments>(arguments)...);
}

// Counts the blocks of a kernel that are resident at once on the stream's multiprocessors, which is the largest
// cooperative grid.
template <class Kernel>
cudaError_t count_resident_blocks(Kernel* kernel, int threads, int shared_bytes, cudaStream_t stream, int* blocks) {
  cudaError_t status = allow_shared_memory(kernel, shared_bytes);
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes);
  }
  *blocks *= multiprocessors_of(stream);
  return status;
}

// Returns how many clusters of a shape are resident at once; 0 if the GPU has no such clusters. No error is left for the
// next call.
template <class Kernel>
int count_resident_clusters(Kernel* kernel, const LaunchShape& shape, cudaStream_t stream) {
  int clusters = 0;
  cudaError_t status = allow_shared_memory(kernel, shape.shared_bytes);
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveClusters(&clusters, kernel, LaunchConfig(shape, stream).get());
  }
  if (status == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

}  // namespace dflash
