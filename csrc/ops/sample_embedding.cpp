// The operators under `soft_embedding` and `sample_and_embed` on a GPU. dflash_ext/ops/soft_embedding.py composes them
// with matrix products.
#include <tuple>

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
  check(logits.size(1) == 1 || logits.stride(1) == 1, kOp, ": the last dimension of logits must be contiguous");
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

std::tuple<Tensor, Tensor, Tensor, Tensor> run_weighted_draw(Tensor logits, Tensor seed,
                                                             std::optional<Tensor> temperatures,
                                                             [[maybe_unused]] double temperature,
                                                             [[maybe_unused]] double softcap) {
  constexpr const char* kDraw = "sample_and_embed";
  check(logits.dim() == 2 && logits.scalar_type() == ScalarType::BFloat16 && logits.stride(1) == 1, kDraw,
        ": logits must be bfloat16 [N, V], their last dimension contiguous");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check(vocab % 8 == 0 && 0 < vocab && vocab < int64_t(1) << 30, kDraw, ": a vocabulary of ", vocab,
        " is not supported");
  check_tensor(kDraw, "seed", seed, logits, ScalarType::Long, {seed.size(0) == 1 ? 1 : rows});
  if (temperatures) check_tensor(kDraw, "temperature", *temperatures, logits, ScalarType::Float, {rows});
  Tensor ids = new_empty(logits, {kSampleIds, rows}, ScalarType::Long),
         reals = new_empty(logits, {kConfidence, rows}, ScalarType::Float),
         weights = new_empty(logits, {rows, vocab}, ScalarType::BFloat16),
         sums = new_empty(logits, {rows}, ScalarType::Float);
#ifdef DFLASH_EXT_CUDA
  WeightedDrawParams p{};
  p.draw.dtype = DType::kBFloat16;
  p.draw.rows = rows;
  p.draw.vocab = vocab;
  p.draw.logits = logits.data_ptr();
  p.draw.stride = logits.stride(0);
  p.draw.filters = {{optional_data<void>(temperatures), temperature}, {nullptr, 0}, {nullptr, 1}, {nullptr, 0}, false};
  p.draw.seed = {static_cast<const int64_t*>(seed.data_ptr()), seed.size(0) != 1};
  p.draw.softcap = softcap;
  p.draw.reals = reals.data_ptr();
  p.draw.ids = static_cast<int64_t*>(ids.data_ptr());
  p.weights = weights.data_ptr();
  p.sums = static_cast<float*>(sums.data_ptr());
  const CudaScope cuda(logits);
  if (rows > 0) check_launch(kDraw, weighted_draw_sm80(p, cuda.stream()));
#else
  fail(kDraw, ": this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)");
#endif
  return {ids, reals, weights, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "weighted_draw(Tensor logits, Tensor seed, Tensor? temperatures, float temperature, float softcap) -> "
      "(Tensor ids, Tensor reals, Tensor weights, Tensor sums)");
  m.def(
      "scaled_exp_(Tensor logits, int begin, Tensor? temperatures, float temperature, float softcap, "
      "Tensor(a!) weights, Tensor(b!) origins, Tensor(c!) sums, Tensor(d!) embedded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("scaled_exp_", TORCH_BOX(&run_scaled_exp));
  m.impl("weighted_draw", TORCH_BOX(&run_weighted_draw));
}

}  // namespace dflash
