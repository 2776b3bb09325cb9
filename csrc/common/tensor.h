// Helpers of all operators around torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "common/check.h"
#include "common/layout.h"

// The symbol is weak, because the CPU build of torch does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace dflash {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class T>
T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double:
      check(tensor.is_cpu(), op, ": float64 ", name, " are supported on the CPU only");
      return DType::kFloat64;
    default: fail(op, ": ", name, " must be float32, bfloat16 or float16 (on the CPU also float64)");
  }
}

// The dtype in which a tensor's values are computed.
inline ScalarType real_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks a tensor that the Python operator has prepared. A failure names a tensor that the Python code missed.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& beside, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  bool fits = tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.dim() == int64_t(sizes.size()) &&
              same_device(tensor, beside);
  for (int64_t dim = 0; fits && dim < tensor.dim(); ++dim) fits = tensor.size(dim) == sizes.begin()[dim];
  if (fits) return;
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + to_text(size);
  fail(op, ": ", name, " must be contiguous [", shape, "], of the right dtype and on the others' device");
}

// The strides of the rows of a [outer, inner, width] tensor.
inline RowStrides row_strides(const char* op, const char* name, const Tensor& rows) {
  check(rows.size(2) <= 1 || rows.stride(2) == 1, op, ": the last dimension of ", name,
        " must be contiguous, its stride is ", rows.stride(2));
  return {rows.stride(0), rows.stride(1)};
}

// Makes the tensor's device current during its lifetime, and holds torch's current stream of that device.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == 0, "no current CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Raises the error that a kernel's launcher returned: null for none, otherwise CUDA's message.
inline void check_launch(const char* op, const char* error) {
  check(error == nullptr, op, ": the CUDA launch failed: ", error ? error : "");
}

// Launches a kernel on the device of `tensor`, in torch's current stream. A macro, because a build without CUDA does not
// have the kernel.
#ifdef DFLASH_EXT_CUDA
template <class Params>
void run_on_gpu(const char* op, const char* (*launch)(const Params&, void*), const Params& params,
                const Tensor& tensor) {
  const CudaScope cuda(tensor);
  check_launch(op, launch(params, cuda.stream()));
}
#define DFLASH_RUN_ON_GPU(op, kernel, params, tensor) run_on_gpu(op, kernel, params, tensor)
#else
#define DFLASH_RUN_ON_GPU(op, kernel, params, tensor) fail(op, ": this build has no CUDA kernels")
#endif

}  // namespace dflash
