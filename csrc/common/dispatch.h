// How a launcher of any family picks the instantiation of its kernel: by dtype, and by head dimension.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"
#include "common/layout.h"

namespace dflash {

template <class T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<__nv_bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::kFloat16;

// Calls launch<T>(stream) with the one of Types that is the dtype. Returns null, or what went wrong: CUDA's message,
// which for a dtype that is not among Types is that of an invalid value.
template <class... Types, class Launch>
const char* launch_by_dtype(DType dtype, void* stream, Launch&& launch) {
  return checked_launch([&] {
    cudaError_t status = cudaErrorInvalidValue;
    const auto launch_if = [&]<class T> {
      if (dtype == kDTypeOf<T>) status = launch.template operator()<T>(static_cast<cudaStream_t>(stream));
    };
    (launch_if.template operator()<Types>(), ...);
    return status;
  });
}

// The same with launch<T, kDim>(stream), for bfloat16 and float16: kDim is the smallest tile that holds the head
// dimension, which is at most 512.
template <class Launch>
const char* launch_by_dtype_and_head_dim(DType dtype, int64_t head_dim, void* stream, Launch&& launch) {
  return launch_by_dtype<__nv_bfloat16, __half>(dtype, stream, [&]<class T>(cudaStream_t stream) {
    if (head_dim <= 64) return launch.template operator()<T, 64>(stream);
    if (head_dim <= 128) return launch.template operator()<T, 128>(stream);
    if (head_dim <= 256) return launch.template operator()<T, 256>(stream);
    return launch.template operator()<T, 512>(stream);
  });
}

}  // namespace dflash
