// Properties of the current GPU that launchers need.
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

// Returns an attribute of the current device, or -1 if there is no device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int gpu = 0, value = 0;
  if (cudaGetDevice(&gpu) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, gpu) == cudaSuccess) return value;
  cudaGetLastError();
  return -1;
}

// Whether Hopper kernels serve on the current device: it must be a Hopper GPU, and DFLASH_EXT_GPU=portable, which tests
// and comparisons set, must not ask for the portable kernels.
inline bool hopper_kernels_serve() {
  static const bool is_refused = [] {
    const char* asked = std::getenv("DFLASH_EXT_GPU");
    return asked != nullptr && std::string_view(asked) == "portable";
  }();
  return !is_refused && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

// Counts the multiprocessors of the current device.
inline cudaError_t count_multiprocessors(int* count) {
  int gpu = 0;
  const cudaError_t status = cudaGetDevice(&gpu);
  return status == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, gpu) : status;
}

// Returns make(), which is called once for each device and number of multiprocessors, and remembered.
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

// Returns how many multiprocessors run the stream's kernels, at least 1: those of the device, or the share that the
// stream's green context or MPS leaves to it.
//
// The share of a device's ordinary context never changes. The driver is asked for it once, because the call takes
// longer than a launch. The share of a green context is asked for every time.
inline int multiprocessors_of(cudaStream_t stream) {
  static const auto context_of =
      driver_function<CUresult (*)(CUstream, CUcontext*, CUgreenCtx*)>("cuStreamGetCtx", 12050);
  static const auto share_of_green =
      driver_function<CUresult (*)(CUgreenCtx, CUdevResource*, CUdevResourceType)>("cuGreenCtxGetDevResource", 12040);
  static const auto share_of =
      driver_function<CUresult (*)(CUcontext, CUdevResource*, CUdevResourceType)>("cuCtxGetDevResource", 12040);
  static const auto current_context = driver_function<CUresult (*)(CUcontext*)>("cuCtxGetCurrent", 4000);
  CUcontext context = nullptr;
  CUgreenCtx green = nullptr;
  // A thread of autograd that has launched nothing yet has no context, and the driver would refuse to answer.
  if (current_context != nullptr && current_context(&context) == CUDA_SUCCESS && context == nullptr) {
    int gpu = 0;
    if (cudaGetDevice(&gpu) == cudaSuccess) cudaSetDevice(gpu);
  }
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
