// How the kernels of a layer follow one another: each may start while the kernel before it ends.
#pragma once

#include "common/dependent_launch.h"
#include "common/launch.h"

namespace dflash {
namespace device {

// Lets the next kernel start, and waits until what the kernel before has written is there. Every thread calls this
// before it reads or writes anything that other kernels write or read.
DFLASH_INLINE void overlap_with_neighbours() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  launch_dependents();
  wait_for_previous_kernel();
#endif
}

}  // namespace device

template <class... Params, class... Arguments>
cudaError_t launch_layer_kernel(void (*kernel)(Params...), LaunchShape shape, cudaStream_t stream,
                                Arguments&&... arguments) {
  shape.overlaps_previous = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return launch_kernel(kernel, shape, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace dflash
