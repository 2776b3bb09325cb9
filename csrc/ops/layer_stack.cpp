// Runs the layers of a model on the CPU as one operator. dflash_ext/ops/layer.py documents the semantics.
#include <cstring>
#include <tuple>
#include <vector>

#include "common/cpu_queue.h"
#include "ops/layer.h"

namespace dflash {
namespace {

constexpr const char* kOp = "run_layers";

// The layers' intermediate results live until the queue has run. Beyond this many bytes it runs.
constexpr int64_t kMostBytes = 8 << 20;

// The weights of a layer in their order in dflash_ext/ops/layer.py.
enum Weight {
  kAttentionNorm,
  kQkv,
  kQkvBias,
  kQNorm,
  kKNorm,
  kOut,
  kOutBias,
  kAfterAttention,
  kMlpNorm,
  kGateUp,
  kGateUpBias,
  kDown,
  kDownBias,
  kAfterMlp,
  kWeights
};

struct Stack {
  const std::vector<Tensor>& weights;
  double eps;
  bool plus_one;
  int64_t gate;

  // A weight of a layer; none if the tensor has no elements.
  std::optional<Tensor> at(int64_t layer, Weight weight) const {
    const Tensor& tensor = weights[layer * kWeights + weight];
    return tensor.numel() ? std::optional(tensor) : std::nullopt;
  }
  Tensor multiply(const Tensor& x, int64_t layer, Weight weight, Weight bias, std::optional<Tensor> norm, int64_t gate,
                  std::optional<Tensor> residual) const {
    return linear_op(x, weights[layer * kWeights + weight], at(layer, bias), norm, eps, plus_one, gate, residual, true);
  }
  // The residual stream after a sublayer, whose output may pass a norm of its own.
  Tensor add(const Tensor& hidden, const Tensor& x, int64_t layer, Weight weight, Weight bias, Weight after) const {
    const auto norm = at(layer, after);
    if (!norm) return multiply(x, layer, weight, bias, std::nullopt, 0, hidden);
    const Tensor update = multiply(x, layer, weight, bias, std::nullopt, 0, std::nullopt);
    const Tensor sum = copy(hidden);
    const Tensor normed = add_rms_norm_op(sum, update, norm, *norm, eps, plus_one);
    after_kernels([update, normed] {});
    return sum;
  }
  static Tensor copy(const Tensor& x) {
    const Tensor out = torch::stable::empty_like(x);
    const int64_t bytes = x.numel() * x.element_size();
    CpuQueue::open()->add(
        [from = static_cast<const char*>(x.data_ptr()), to = static_cast<char*>(out.data_ptr())](
            int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); },
        bytes, 1 << 16);
    return out;
  }
};

std::tuple<Tensor, Tensor> run_layers(
    Tensor hidden, std::vector<Tensor> weights, std::vector<int64_t> kinds, std::vector<Tensor> k_caches,
    std::vector<Tensor> v_caches, std::vector<Tensor> positions, std::vector<Tensor> places, std::vector<Tensor> pages,
    std::vector<Tensor> tables, std::vector<Tensor> rotary,
    std::vector<Tensor> bounds, int64_t kv_len, std::vector<int64_t> taps, double eps, bool plus_one, int64_t gate,
    double scale, std::optional<double> softcap) {
  const int64_t layers = kinds.size();
  check(hidden.dim() == 2 && int64_t(weights.size()) == layers * kWeights && int64_t(k_caches.size()) == layers &&
            int64_t(v_caches.size()) == layers && bounds.size() == 2 * rotary.size(),
        kOp, ": hidden must be [T, H], with ", int64_t(kWeights), " weights and two caches for each layer");
  for (const auto* where : {&positions, &places, &pages, &tables}) {
    check(2 * where->size() == rotary.size(), kOp, ": positions, places, pages and tables are needed for each kind");
  }
  const Stack stack{weights, eps, plus_one, gate};
  const Tensor tapped = new_empty(hidden, {hidden.size(0), int64_t(taps.size()), hidden.size(1)}, hidden.scalar_type());
  CpuQueue queue;
  int64_t bytes = 0;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t kind = kinds[i];
    check(0 <= kind && 2 * kind < int64_t(rotary.size()), kOp, ": layer ", i, " is of kind ", kind);
    const Tensor *cos_sin = &rotary[2 * kind], *mask = &bounds[4 * kind];
    const Tensor projected = stack.multiply(hidden, i, kQkv, kQkvBias, stack.at(i, kAttentionNorm), 0, std::nullopt);
    Tensor queries =
        rotate_to_cache_op(projected, k_caches[i], v_caches[i], positions[kind], places[kind], pages[kind], cos_sin[0],
                           cos_sin[1], stack.at(i, kQNorm), stack.at(i, kKNorm), eps, plus_one);
    // A token that is an entry of its own becomes a row of the batch's entry again.
    const int64_t batch = tables[kind].size(0);
    queries = torch::stable::transpose(
        torch::stable::view(torch::stable::transpose(queries, 1, 2),
                            {batch, hidden.size(0) / batch, queries.size(1), queries.size(3)}), 1, 2);
    const Tensor attended = block_attn_decode_op(queries, torch::stable::transpose(k_caches[i], 1, 2),
                                                 torch::stable::transpose(v_caches[i], 1, 2), mask[0], mask[1], mask[2],
                                                 mask[3], kv_len, tables[kind], std::nullopt, false, false, scale,
                                                 softcap);
    const Tensor rows =
        torch::stable::view(torch::stable::transpose(attended, 1, 2), {hidden.size(0), attended.numel() / hidden.size(0)});
    const Tensor middle = stack.add(hidden, rows, i, kOut, kOutBias, kAfterAttention);
    const Tensor inner = stack.multiply(middle, i, kGateUp, kGateUpBias, stack.at(i, kMlpNorm), gate, std::nullopt);
    const Tensor after = stack.add(middle, inner, i, kDown, kDownBias, kAfterMlp);
    after_kernels([hidden, projected, queries, attended, middle, inner] {});
    hidden = after;
    for (size_t at = 0; at < taps.size(); ++at) {
      if (taps[at] != i) continue;
      after_kernels([hidden, to = torch::stable::select(tapped, 1, at)]() mutable { torch::stable::copy_(to, hidden); });
    }
    for (const Tensor& x : {projected, queries, attended, middle, inner, hidden}) bytes += x.numel() * x.element_size();
    if (bytes < kMostBytes && i + 1 < layers) continue;
    queue.run();
    bytes = 0;
  }
  return {hidden, tapped};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "run_layers(Tensor hidden, Tensor[] weights, int[] kinds, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, "
      "Tensor[] positions, Tensor[] places, Tensor[] pages, Tensor[] tables, Tensor[] rotary, Tensor[] bounds, "
      "int kv_len, int[] taps, "
      "float eps, bool plus_one, int gate, float scale, float? softcap) -> (Tensor output, Tensor tapped)");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) { m.impl("run_layers", TORCH_BOX(&run_layers)); }

}  // namespace dflash
