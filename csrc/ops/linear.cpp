// Operators of the linear family. dflash_ext/ops/linear.py documents the semantics.
#include "linear/kernels.h"

#include <vector>

#include "common/cpu.h"
#include "common/tensor.h"
#include "ops/layer.h"

namespace dflash {

DFLASH_CPU_KERNEL(LinearParams, linear)

namespace {

constexpr const char* kOp = "linear";

// A tensor that is read row by row, without gaps.
const void* rows_of(const char* name, const Tensor& tensor, const Tensor& beside) {
  check(tensor.is_contiguous() && tensor.scalar_type() == beside.scalar_type() && same_device(tensor, beside), kOp, ": ",
        name, " must be contiguous, and of x's dtype and device");
  return tensor.data_ptr();
}

const void* vector_of(const char* name, const std::optional<Tensor>& tensor, const Tensor& beside, int64_t size) {
  if (!tensor) return nullptr;
  check(tensor->dim() == 1 && tensor->size(0) == size, kOp, ": ", name, " must have ", size, " elements");
  return rows_of(name, *tensor, beside);
}

void run(const LinearParams& p, const Tensor& x) {
  if (p.rows == 0 || p.columns == 0) return;
  if (x.is_cpu()) {
    // A thread gets at least 64 K products. With less, waking it costs more than it saves.
    const int64_t panels = (p.columns + kLinearPanel - 1) / kLinearPanel;
    return run_on_cpu(linear, p, panels, 1 + 65536 / (kLinearPanel * (p.inner + 1) * p.rows));
  }
#ifdef DFLASH_EXT_HOPPER
  check(linear_sm90_serves(p), kOp,
        ": on a GPU the kernel takes bfloat16 and float16 that are aligned to 16 bytes, K a multiple of 8, on Hopper");
  const CudaScope cuda(x);
  check_launch(kOp, linear_sm90(p, cuda.stream()));
#else
  fail(kOp, ": this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)");
#endif
}

}  // namespace

Tensor linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm, double norm_eps,
                 bool norm_plus_one, int64_t gate, std::optional<Tensor> residual, bool constant_weight) {
  const int64_t dims = x.dim();
  check(dims > 0 && weight.dim() == 2 && x.size(dims - 1) == weight.size(1) && weight.size(1) > 0, kOp,
        ": x must be [..., K], and weight [N, K], with K > 0");
  check(gate >= 0 && gate <= 2 && (gate == 0 || weight.size(0) % 2 == 0), kOp,
        ": a gate needs a weight with an even number of rows");
  LinearParams p{};
  p.dtype = dtype_of(kOp, "x", x);
  p.gate = static_cast<Gate>(gate);
  p.inner = weight.size(1);
  p.columns = weight.size(0) / (gate ? 2 : 1);
  std::vector<int64_t> shape(dims, p.columns);
  p.rows = 1;
  for (int64_t dim = 0; dim + 1 < dims; ++dim) p.rows *= shape[dim] = x.size(dim);
  p.x = rows_of("x", x, x);
  p.weight_dtype = dtype_of(kOp, "weight", weight);
  const bool is_narrow = x.is_cpu() && p.dtype == DType::kFloat32 && p.weight_dtype == DType::kBFloat16;
  p.weight = rows_of("weight", weight, is_narrow ? weight : x);
  p.bias = vector_of("bias", bias, x, weight.size(0));
  p.norm = vector_of("norm", norm, x, p.inner);
  p.norm_eps = norm_eps;
  p.norm_plus_one = norm_plus_one;
  if (residual) {
    check(residual->dim() == dims && residual->numel() == p.rows * p.columns && residual->size(dims - 1) == p.columns,
          kOp, ": residual must have the shape of the result");
    p.residual = rows_of("residual", *residual, x);
  }
  Tensor out = torch::stable::new_empty(x, shape);
  p.out = out.data_ptr();
  p.weight_is_constant = constant_weight;
  run(p, x);
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float norm_eps, bool norm_plus_one, int gate, "
      "Tensor? residual, bool constant_weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

}  // namespace dflash
