// The operator under `soft_embedding` on a GPU. dflash_ext/ops/soft_embedding.py composes it with matrix products.
#include "common/tensor.h"
#include "sample/kernels.h"

namespace dflash {
namespace {

constexpr const char* kOp = "soft_embedding";

void run_scaled_exp([[maybe_unused]] Tensor logits, [[maybe_unused]] int64_t begin,
                    [[maybe_unused]] std::optional<Tensor> temperatures, [[maybe_unused]] double temperature,
                    [[maybe_unused]] double softcap, [[maybe_unused]] Tensor weights,
                    [[maybe_unused]] Tensor origins, [[maybe_unused]] Tensor sums, [[maybe_unused]] Tensor embedded) {
#ifdef DFLASH_EXT_CUDA
  check(logits.dim() == 2 && weights.dim() == 2 && embedded.dim() == 2, kOp, ": logits must be [N, V]");
  const int64_t rows = logits.size(0), count = weights.size(1);
  check(begin >= 0 && begin + count <= logits.size(1) && count < int64_t(1) << 30, kOp, ": tokens ", begin, " to ",
        begin + count, " are no chunk of ", logits.size(1));
  check(logits.stride(1) == 1, kOp, ": the last dimension of logits must be contiguous");
  check_tensor(kOp, "weights", weights, logits, weights.scalar_type(), {rows, count});
  check_tensor(kOp, "origins", origins, logits, ScalarType::Float, {rows});
  check_tensor(kOp, "sums", sums, logits, ScalarType::Float, {rows});
  check_tensor(kOp, "embedded", embedded, logits, ScalarType::Float, {rows, embedded.size(1)});
  if (temperatures) check_tensor(kOp, "temperature", *temperatures, logits, ScalarType::Float, {rows});
  ScaledExpParams p{};
  p.dtype = dtype_of(kOp, "logits", logits);
  p.weight_dtype = dtype_of(kOp, "embedding", weights);
  p.rows = rows;
  p.begin = begin;
  p.count = count;
  p.width = embedded.size(1);
  p.logits = logits.data_ptr();
  p.stride = logits.stride(0);
  p.temperature = {optional_data<void>(temperatures), temperature};
  p.softcap = softcap;
  p.weights = weights.data_ptr();
  p.origins = static_cast<float*>(origins.data_ptr());
  p.sums = static_cast<float*>(sums.data_ptr());
  p.embedded = static_cast<float*>(embedded.data_ptr());
  if (rows == 0 || count == 0) return;
  const CudaScope cuda(logits);
  check_launch(kOp, scaled_exp_sm80(p, cuda.stream()));
#else
  fail(kOp, ": this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)");
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "scaled_exp_(Tensor logits, int begin, Tensor? temperatures, float temperature, float softcap, "
      "Tensor(a!) weights, Tensor(b!) origins, Tensor(c!) sums, Tensor(d!) embedded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("scaled_exp_", TORCH_BOX(&run_scaled_exp)); }

}  // namespace dflash
