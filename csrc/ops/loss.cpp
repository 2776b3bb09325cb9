// Operators of the loss family. Shapes here are [outer, inner, vocab] for logits and [outer, inner] for everything per
// row; dflash_ext/ops/loss.py brings tensors into this form and documents the semantics.
#include "loss/kernels.h"

#include <tuple>

#include "common/cpu.h"
#include "common/tensor.h"

namespace dflash {

DFLASH_CPU_KERNEL(CrossEntropyParams, masked_cross_entropy)

namespace {

constexpr const char* kOp = "masked_cross_entropy";

void check_per_row(const char* name, const Tensor& tensor, const Tensor& logits, ScalarType dtype) {
  check(tensor.dim() == 2 && tensor.size(0) == logits.size(0) && tensor.size(1) == logits.size(1) &&
            tensor.is_contiguous() && tensor.scalar_type() == dtype &&
            same_device(tensor, logits),
        kOp, ": ", name, " must be contiguous, one entry a row, on the logits' device and of the right dtype");
}

// Rows of weight 0 may have any target. A CUDA kernel cannot raise, and makes a row with a wrong target NaN.
template <class Real>
void check_targets(const CrossEntropyParams& p) {
  const Real* weight = static_cast<const Real*>(p.weight);
  for (int64_t row = 0; row < p.rows; ++row) {
    const bool counts = !weight || weight[row] != 0;
    check(!counts || (p.target[row] >= 0 && p.target[row] < p.vocab), kOp, ": target ", p.target[row], " of row ", row,
          " is outside the vocabulary [0, ", p.vocab, "); rows that do not count have a "
          "weight of 0 or the target ignore_index");
  }
}

struct Options {
  int64_t teacher_kind;
  double teacher_mix, softcap, label_smoothing, z_loss;
};

CrossEntropyParams params_of(Pass pass, const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& teacher, const Options& options) {
  CrossEntropyParams p{};
  p.pass = pass;
  p.dtype = dtype_of(kOp, "logits", logits);
  check(logits.dim() == 3, kOp, ": logits must be [outer, inner, vocab], they have ", logits.dim(), " dimensions");
  p.inner = logits.size(1);
  p.rows = logits.size(0) * p.inner;
  p.vocab = logits.size(2);
  check(p.vocab > 0 && p.vocab < int64_t(1) << 31, kOp, ": a vocabulary of ", p.vocab, " is not supported");
  p.logits = logits.data_ptr();
  p.logits_strides = row_strides(kOp, "logits", logits);

  check_per_row("target", target, logits, ScalarType::Long);
  p.target = static_cast<const int64_t*>(target.data_ptr());
  if (weight) check_per_row("weight", *weight, logits, real_of(logits));
  p.weight = optional_data<void>(weight);
  p.teacher_kind = Teacher::kNone;
  if (teacher) {
    check(teacher->dim() == 3 && teacher->size(0) == logits.size(0) && teacher->size(1) == p.inner &&
              teacher->size(2) == p.vocab && teacher->scalar_type() == logits.scalar_type() &&
              same_device(*teacher, logits),
          kOp, ": teacher must have the logits' shape, dtype and device");
    p.teacher_kind = options.teacher_kind == 0 ? Teacher::kKL : Teacher::kTV;
    p.teacher = teacher->data_ptr();
    p.teacher_strides = row_strides(kOp, "teacher", *teacher);
  }
  p.softcap = options.softcap;
  p.label_smoothing = options.label_smoothing;
  p.z_loss = options.z_loss;
  p.teacher_mix = options.teacher_mix;
  return p;
}

void run(const CrossEntropyParams& p, const Tensor& logits) {
  if (p.rows == 0) return;
  if (logits.is_cpu()) {
    p.dtype == DType::kFloat64 ? check_targets<double>(p) : check_targets<float>(p);
    // A thread gets at least 32 K logits. With less, waking it costs more than it saves.
    run_on_cpu(masked_cross_entropy, p, p.rows, 1 + 32768 / p.vocab);
    return;
  }
#ifdef DFLASH_EXT_CUDA
  const CudaScope cuda(logits);
#ifdef DFLASH_EXT_HOPPER
  if (hopper_serves(masked_cross_entropy_sm90_misses(p))) return check_launch(kOp, masked_cross_entropy_sm90(p, cuda.stream()));
#endif
  check_launch(kOp, masked_cross_entropy_sm80(p, cuda.stream()));
#else
  fail(kOp, ": this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)");
#endif
}

// Returns losses, nll, correct and entropy, each [outer, inner].
using Rows = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Rows new_rows(CrossEntropyParams& p, const Tensor& logits) {
  const auto make = [&](ScalarType dtype) { return new_empty(logits, {logits.size(0), logits.size(1)}, dtype); };
  Rows rows{make(real_of(logits)), make(real_of(logits)), make(ScalarType::Bool), make(real_of(logits))};
  p.losses = std::get<0>(rows).data_ptr();
  p.nll = std::get<1>(rows).data_ptr();
  p.correct = static_cast<bool*>(std::get<2>(rows).data_ptr());
  p.entropy = std::get<3>(rows).data_ptr();
  return rows;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                           std::optional<Tensor> teacher, int64_t teacher_kind,
                                                           double teacher_mix, double softcap, double label_smoothing,
                                                           double z_loss) {
  auto p = params_of(Pass::kForward, logits, target, weight, teacher,
                     {teacher_kind, teacher_mix, softcap, label_smoothing, z_loss});
  auto [losses, nll, correct, entropy] = new_rows(p, logits);
  Tensor stats = new_empty(logits, {logits.size(0), logits.size(1), kNumStats}, real_of(logits));
  p.stats = stats.data_ptr();
  run(p, logits);
  return {losses, nll, correct, entropy, stats};
}

Tensor backward(Tensor grad_losses, Tensor logits, Tensor target, std::optional<Tensor> weight,
                std::optional<Tensor> teacher, Tensor stats, int64_t teacher_kind, double teacher_mix, double softcap,
                double label_smoothing, double z_loss) {
  auto p = params_of(Pass::kBackward, logits, target, weight, teacher,
                     {teacher_kind, teacher_mix, softcap, label_smoothing, z_loss});
  check_per_row("grad_losses", grad_losses, logits, real_of(logits));
  p.grad_losses = grad_losses.data_ptr();
  p.stats = stats.data_ptr();
  Tensor grad = new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)}, logits.scalar_type());
  p.grad = grad.data_ptr();
  p.grad_strides = row_strides(kOp, "grad", grad);
  run(p, logits);
  return grad;
}

Rows in_place(Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> teacher,
              int64_t teacher_kind, double teacher_mix, double softcap, double label_smoothing, double z_loss) {
  auto p = params_of(Pass::kInPlace, logits, target, weight, teacher,
                     {teacher_kind, teacher_mix, softcap, label_smoothing, z_loss});
  p.grad = logits.data_ptr();
  p.grad_strides = p.logits_strides;
  Rows rows = new_rows(p, logits);
  run(p, logits);
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "masked_cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? teacher, int teacher_kind, "
      "float teacher_mix, float softcap, float label_smoothing, float z_loss) "
      "-> (Tensor losses, Tensor nll, Tensor correct, Tensor entropy, Tensor stats)");
  m.def(
      "masked_cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor? teacher, Tensor stats, int teacher_kind, float teacher_mix, float softcap, float label_smoothing, "
      "float z_loss) -> Tensor");
  m.def(
      "masked_cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? teacher, int teacher_kind, "
      "float teacher_mix, float softcap, float label_smoothing, float z_loss) "
      "-> (Tensor losses, Tensor nll, Tensor correct, Tensor entropy)");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&forward));
  m.impl("masked_cross_entropy_backward", TORCH_BOX(&backward));
  m.impl("masked_cross_entropy_", TORCH_BOX(&in_place));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&forward));
  m.impl("masked_cross_entropy_backward", TORCH_BOX(&backward));
  m.impl("masked_cross_entropy_", TORCH_BOX(&in_place));
}

}  // namespace dflash
