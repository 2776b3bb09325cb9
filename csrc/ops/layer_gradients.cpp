// Operators of the layer family for training. dflash_ext/ops/trained_layer.py documents the semantics.
#include "layer/params.h"

#include "common/cpu.h"
#include "common/tensor.h"
#include "ops/layer_common.h"

namespace dflash {

DFLASH_CPU_KERNEL(AddRmsNormParams, add_rms_norm)
DFLASH_CPU_KERNEL(GatedParams, gated)
DFLASH_CPU_KERNEL(GatedBackwardParams, gated_backward)
DFLASH_CPU_KERNEL(RmsNormBackwardParams, rms_norm_backward)
DFLASH_CPU_KERNEL(RotateHeadsParams, rotate_heads)
DFLASH_CPU_KERNEL(RotateHeadsBackwardParams, rotate_heads_backward)

namespace {

// Into how many parts a weight's gradient is summed, of which some may have no rows. The number does not depend on the
// device's size or on the number of threads, so that the bits of the sum do not either.
int64_t parts_on(const Tensor& device) { return device.is_cpu() ? 64 : 512; }

std::tuple<Tensor, Tensor> rms_norm_op(Tensor x, std::optional<Tensor> update, Tensor weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  AddRmsNormParams p = norm_of<AddRmsNormParams>(kOp, "x", x, "weight", weight, eps);
  const ScalarType dtype = x.scalar_type();
  if (update) check_tensor(kOp, "update", *update, x, dtype, {p.rows, p.width});
  Tensor total = new_empty(x, {update ? p.rows : 0, p.width}, dtype);
  Tensor out = torch::stable::empty_like(x);
  if (p.rows == 0 || p.width == 0) return {total, out};
  p.residual = x.data_ptr();
  p.total = total.data_ptr();
  p.update = optional_data<void>(update);
  p.update_stride = p.width;
  p.norm = weight.data_ptr();
  p.out = out.data_ptr();
  if (x.is_cpu()) {
    run_on_cpu(add_rms_norm, p, p.rows, 1 + 16384 / p.width);
  } else {
    check_width_on_gpu(kOp, x, p.width, kMostInSharedMemory);
    DFLASH_RUN_ON_GPU(kOp, add_rms_norm_sm80, p, x);
  }
  return {total, out};
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(Tensor grad, std::optional<Tensor> grad_total, Tensor x, Tensor weight,
                                                double eps) {
  constexpr const char* kOp = "rms_norm_backward";
  RmsNormBackwardParams p = norm_of<RmsNormBackwardParams>(kOp, "x", x, "weight", weight, eps);
  p.parts = parts_on(x);
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "grad", grad, x, dtype, {p.rows, p.width});
  if (grad_total) check_tensor(kOp, "grad_total", *grad_total, x, dtype, {p.rows, p.width});
  Tensor grad_x = torch::stable::empty_like(x), parts = new_empty(x, {p.parts, p.width}, real_of(x));
  if (p.width == 0) return {grad_x, parts};
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.grad = grad.data_ptr();
  p.grad_total = optional_data<void>(grad_total);
  p.grad_x = grad_x.data_ptr();
  p.grad_weight = parts.data_ptr();
  if (x.is_cpu()) {
    run_on_cpu(rms_norm_backward, p, p.parts, 1);
  } else {
    check_width_on_gpu(kOp, x, p.width, kMostInSharedMemory);
    DFLASH_RUN_ON_GPU(kOp, rms_norm_backward_sm80, p, x);
  }
  return {grad_x, parts};
}

RotateHeadsParams heads_of(const char* op, const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin,
                           double eps) {
  check(x.dim() == 3 && cos.dim() == 2, op, ": x must be [T, heads, D], cos and sin [T, at least D / 2]");
  RotateHeadsParams p{};
  p.dtype = dtype_of(op, "x", x);
  p.rows = x.size(0);
  p.heads = x.size(1);
  p.head_dim = x.size(2);
  p.table_stride = cos.size(1);
  const ScalarType real = real_of(x);
  check(p.head_dim > 0 && p.head_dim <= 512 && p.head_dim % 2 == 0 && p.table_stride >= p.head_dim / 2, op,
        ": heads of ", p.head_dim, " with tables of ", p.table_stride, " are not supported");
  check_tensor(op, "x", x, x, x.scalar_type(), {p.rows, p.heads, p.head_dim});
  check_tensor(op, "weight", weight, x, real, {p.head_dim});
  check_tensor(op, "cos", cos, x, real, {p.rows, p.table_stride});
  check_tensor(op, "sin", sin, x, real, {p.rows, p.table_stride});
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.eps = eps;
  return p;
}

Tensor rotate_heads_op(Tensor x, Tensor weight, Tensor cos, Tensor sin, double eps) {
  constexpr const char* kOp = "rotate_heads";
  RotateHeadsParams p = heads_of(kOp, x, weight, cos, sin, eps);
  Tensor out = torch::stable::empty_like(x);
  const int64_t heads = p.rows * p.heads;
  if (heads == 0) return out;
  p.out = out.data_ptr();
  if (x.is_cpu()) {
    run_on_cpu(rotate_heads, p, heads, 1 + 16384 / p.head_dim);
  } else {
    DFLASH_RUN_ON_GPU(kOp, rotate_heads_sm80, p, x);
  }
  return out;
}

std::tuple<Tensor, Tensor> rotate_heads_backward_op(Tensor grad, Tensor x, Tensor weight, Tensor cos, Tensor sin,
                                                    double eps) {
  constexpr const char* kOp = "rotate_heads_backward";
  RotateHeadsBackwardParams p{};
  p.forward = heads_of(kOp, x, weight, cos, sin, eps);
  const int64_t rows = p.forward.rows, heads = p.forward.heads, head_dim = p.forward.head_dim;
  check_tensor(kOp, "grad", grad, x, x.scalar_type(), {rows, heads, head_dim});
  p.parts = parts_on(x);
  Tensor grad_x = torch::stable::empty_like(x), parts = new_empty(x, {p.parts, head_dim}, real_of(x));
  p.grad = grad.data_ptr();
  p.grad_x = grad_x.data_ptr();
  p.grad_weight = parts.data_ptr();
  if (x.is_cpu()) {
    run_on_cpu(rotate_heads_backward, p, p.parts, 1);
  } else {
    DFLASH_RUN_ON_GPU(kOp, rotate_heads_backward_sm80, p, x);
  }
  return {grad_x, parts};
}

Tensor gated_pair_op(Tensor gate, Tensor up, int64_t activation) {
  constexpr const char* kOp = "gated_pair";
  check(gate.dim() == 2, kOp, ": gate must be [T, I]");
  GatedParams p{};
  p.dtype = dtype_of(kOp, "gate", gate);
  p.rows = gate.size(0);
  p.width = p.stride = gate.size(1);
  p.activation = Activation(activation);
  check_tensor(kOp, "gate", gate, gate, gate.scalar_type(), {p.rows, p.width});
  check_tensor(kOp, "up", up, gate, gate.scalar_type(), {p.rows, p.width});
  Tensor out = torch::stable::empty_like(gate);
  if (p.rows == 0 || p.width == 0) return out;
  p.gate = gate.data_ptr();
  p.up = up.data_ptr();
  p.out = out.data_ptr();
  if (gate.is_cpu()) {
    run_on_cpu(gated, p, p.rows * p.width, 16384);
  } else {
    check_width_on_gpu(kOp, gate, p.width);
    DFLASH_RUN_ON_GPU(kOp, gated_sm80, p, gate);
  }
  return out;
}

void gated_pair_backward_op(Tensor grad, Tensor other, Tensor gate, Tensor up, int64_t activation) {
  constexpr const char* kOp = "gated_pair_backward_";
  check(gate.dim() == 2, kOp, ": gate must be [T, I]");
  GatedBackwardParams p{};
  p.dtype = dtype_of(kOp, "gate", gate);
  p.count = gate.size(0) * gate.size(1);
  p.activation = Activation(activation);
  for (const Tensor* tensor : {&grad, &other, &gate, &up}) {
    check_tensor(kOp, "each tensor", *tensor, gate, gate.scalar_type(), {gate.size(0), gate.size(1)});
  }
  if (p.count == 0) return;
  p.gate = gate.data_ptr();
  p.up = up.data_ptr();
  p.grad = grad.data_ptr();
  p.other = other.data_ptr();
  if (gate.is_cpu()) {
    run_on_cpu(gated_backward, p, p.count, 16384);
  } else {
    DFLASH_RUN_ON_GPU(kOp, gated_backward_sm80, p, gate);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def("rms_norm(Tensor x, Tensor? update, Tensor weight, float eps) -> (Tensor total, Tensor out)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, float eps) -> (Tensor grad_x, "
      "Tensor grad_weight)");
  m.def("rotate_heads(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor");
  m.def(
      "rotate_heads_backward(Tensor grad, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> (Tensor "
      "grad_x, Tensor grad_weight)");
  m.def("gated_pair(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def("gated_pair_backward_(Tensor(a!) grad, Tensor(b!) other, Tensor gate, Tensor up, int activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_op));
  m.impl("rotate_heads", TORCH_BOX(&rotate_heads_op));
  m.impl("rotate_heads_backward", TORCH_BOX(&rotate_heads_backward_op));
  m.impl("gated_pair", TORCH_BOX(&gated_pair_op));
  m.impl("gated_pair_backward_", TORCH_BOX(&gated_pair_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_op));
  m.impl("rotate_heads", TORCH_BOX(&rotate_heads_op));
  m.impl("rotate_heads_backward", TORCH_BOX(&rotate_heads_backward_op));
  m.impl("gated_pair", TORCH_BOX(&gated_pair_op));
  m.impl("gated_pair_backward_", TORCH_BOX(&gated_pair_backward_op));
}

}  // namespace dflash
