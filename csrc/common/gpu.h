// What launchers ask of the current GPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "common/driver.h"

namespace dflash {

// An attribute of the current device; -1 where there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int gpu = 0, value = 0;
  if (cudaGetDevice(&gpu) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, gpu) == cudaSuccess) return value;
  cudaGetLastError();
  return -1;
}

// Whether the kernels for Hopper serve here: the current device is one, and DFLASH_EXT_GPU=portable does not ask for
// the portable ones (tests, comparisons).
inline bool hopper_kernels_serve() {
  static const bool is_refused = [] {
    const char* asked = std::getenv("DFLASH_EXT_GPU");
    return asked != nullptr && std::string_view(asked) == "portable";
  }();
  return !is_refused && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

// The multiprocessors of the current device.
inline cudaError_t count_multiprocessors(int* count) {
  int gpu = 0;
  const cudaError_t status = cudaGetDevice(&gpu);
  return status == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, gpu) : status;
}

// What `make` finds out about a share of the current device, asked for once for each device and share.
template <class Make>
auto once_per_device(int multiprocessors, Make make) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, decltype(make())> known;
  int gpu = 0;
  cudaGetDevice(&gpu);
  const std::lock_guard lock(mutex);
  const std::pair key(gpu, multiprocessors);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, make()).first;
  return found->second;
}

// How many multiprocessors run the stream's kernels: those of the device, or the share of them that its green context
// or MPS leaves to it. At least 1.
//
// The share of a device's ordinary context never changes, so the driver is asked for it once: the question takes longer
// than a launch. A green context is asked every time.
inline int multiprocessors_of(cudaStream_t stream) {
  static const auto context_of =
      driver_function<CUresult (*)(CUstream, CUcontext*, CUgreenCtx*)>("cuStreamGetCtx", 12050);
  static const auto share_of_green =
      driver_function<CUresult (*)(CUgreenCtx, CUdevResource*, CUdevResourceType)>("cuGreenCtxGetDevResource", 12040);
  static const auto share_of =
      driver_function<CUresult (*)(CUcontext, CUdevResource*, CUdevResourceType)>("cuCtxGetDevResource", 12040);
  CUcontext context = nullptr;
  CUgreenCtx green = nullptr;
  const bool is_known = context_of != nullptr && share_of_green != nullptr && share_of != nullptr &&
                        context_of(stream, &context, &green) == CUDA_SUCCESS;
  const auto ask = [&] {
    int all = 0;
    if (count_multiprocessors(&all) != cudaSuccess) return 1;
    CUdevResource share{};
    const bool is_shared = is_known && (green != nullptr ? share_of_green(green, &share, CU_DEV_RESOURCE_TYPE_SM)
                                                         : share_of(context, &share, CU_DEV_RESOURCE_TYPE_SM)) ==
                                           CUDA_SUCCESS;
    return is_shared ? std::clamp(static_cast<int>(share.sm.smCount), 1, all) : all;
  };
  return green != nullptr ? ask() : once_per_device(0, ask);
}

}  // namespace dflash
