// The dtypes and strides of tensors, in plain types that kernels can use.
#pragma once

#include <cstdint>

namespace dflash {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Row r of a [outer, inner, width] tensor starts at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RowStrides {
  int64_t outer = 0, inner = 0;
};

}  // namespace dflash
