// Functions of the CUDA driver. They come through the runtime, so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace dflash {

// The driver's function of that name as CUDA `version` has it (12040 is CUDA 12.4); null where the driver is older.
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
