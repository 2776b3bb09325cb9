// Functions of the CUDA driver. The runtime looks them up, so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace dflash {

// Returns the driver function of this name as of CUDA `version` (12040 is CUDA 12.4), or null if the driver is older.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Function>(function);
}

}  // namespace dflash
