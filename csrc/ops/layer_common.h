// What the operators of the layer family share.
#pragma once

#include "common/tensor.h"
#include "layer/params.h"

namespace dflash {

// The parameters of a norm of rows [T, H] by a weight [H], which are checked. `name` and `weight_name` are for errors.
template <class Params>
Params norm_of(const char* op, const char* name, const Tensor& rows, const char* weight_name, const Tensor& weight,
               double eps) {
  check(rows.dim() == 2, op, ": ", name, " must be [T, H]");
  Params p{};
  p.dtype = dtype_of(op, name, rows);
  p.rows = rows.size(0);
  p.width = rows.size(1);
  p.eps = eps;
  check_tensor(op, name, rows, rows, rows.scalar_type(), {p.rows, p.width});
  check_tensor(op, weight_name, weight, rows, rows.scalar_type(), {p.width});
  return p;
}

// The elements between the beginnings of two rows of [rows, width], each of which is contiguous.
inline int64_t stride_of(const char* op, const char* name, const Tensor& tensor, const Tensor& beside, int64_t rows,
                         int64_t width) {
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == width &&
            (width <= 1 || tensor.stride(1) == 1) && tensor.scalar_type() == beside.scalar_type() &&
            same_device(tensor, beside),
        op, ": ", name, " must be [", rows, ", ", width,
        "] with contiguous rows, of the right dtype and on the others' device");
  return tensor.stride(0);
}

// GPU threads read 16 bytes of a row. A row of a norm also lies in shared memory, in 4 bytes for each element.
constexpr int64_t kMostInSharedMemory = 24576;
inline void check_width_on_gpu(const char* op, const Tensor& rows, int64_t width, int64_t most = INT64_MAX) {
  check(width % (rows.scalar_type() == ScalarType::Float ? 4 : 8) == 0 && width <= most, op, ": a width of ", width,
        " is not supported on a GPU; multiples of 16 bytes are, for norms up to ", kMostInSharedMemory);
}

}  // namespace dflash
