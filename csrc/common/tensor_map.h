// Describes a tensor to Hopper's copy engine (TMA).
#pragma once

#include <initializer_list>
#include <utility>

#include "common/driver.h"
#include "common/layout.h"

namespace dflash {

// A tensor of 16-bit elements, and the boxes in which TMA copies it. Sizes and strides count elements; the stride of
// the first dimension is 1. A row of a box has 64 elements, under the 128-byte swizzle in shared memory.
struct TensorBox {
  const void* data;
  int64_t sizes[4], strides[4];
  int64_t box[4];
};

// Whether TMA can describe the tensor: it must not be empty, and its base and strides must be multiples of 16 bytes.
inline bool copy_engine_reads(const TensorBox& t) {
  bool fits = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.sizes[0] > 0;
  for (int d = 1; d < 4; ++d) {
    fits = fits && t.sizes[d] > 0 && (t.sizes[d] == 1 || (t.strides[d] > 0 && t.strides[d] % 8 == 0));
  }
  return fits;
}

inline cudaError_t make_tensor_map(CUtensorMap* map, DType dtype, const TensorBox& t) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4], steps[4] = {1, 1, 1, 1};
  for (int d = 0; d < 4; ++d) {
    sizes[d] = t.sizes[d];
    box[d] = t.box[d];
    if (d > 0) strides[d - 1] = t.sizes[d] == 1 ? 16 : t.strides[d] * 2;
  }
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, 4, const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t make_tensor_maps(DType dtype, std::initializer_list<std::pair<CUtensorMap*, TensorBox>> described) {
  for (const auto& [map, box] : described) {
    const cudaError_t status = make_tensor_map(map, dtype, box);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace dflash
