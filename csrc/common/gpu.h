// What launchers ask of the current GPU.
#pragma once

#include <cuda_runtime.h>

namespace dflash {

inline cudaError_t count_multiprocessors(int* count) {
  int gpu = 0;
  const cudaError_t status = cudaGetDevice(&gpu);
  return status == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, gpu) : status;
}

}  // namespace dflash
