// Runs the layers of a model as one operator. dflash_ext/ops/layer.py documents the semantics.
//
// Each layer is the same few operators on both devices. On the CPU their kernels wait in a queue, so that threads are woken
// once for many of them. On a GPU the host only launches them.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "common/cpu_queue.h"
#include "ops/layer.h"

// PyTorch's own operators on a GPU, with which it runs compiled models. Weak, because the CPU build does not have them.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                            AtenTensorHandle mat2);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_cat(const AtenTensorHandle* tensors, int64_t count, int64_t dim,
                                                         AtenTensorHandle* joined);
}

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

// How a product is computed (dflash_ext/ops/linear.py): by the kernel, by the kernel behind a norm of its own, or step by
// step, with PyTorch's product.
enum Form { kKernel, kNormApart, kSteps };

// x @ weight.T + bias, or that added to `sum` in place.
Tensor torch_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::optional<Tensor> sum) {
  check(aoti_torch_cuda_mm_out != nullptr && aoti_torch_cuda_addmm_out != nullptr, "this torch has no CUDA");
  const Tensor columns = torch::stable::transpose(weight, 0, 1);
  const auto add_product = [&](const Tensor& out, const Tensor& to) {
    check(aoti_torch_cuda_addmm_out(out.get(), to.get(), x.get(), columns.get(), 1.0, 1.0) == 0, kOp, ": addmm failed");
  };
  Tensor out = sum ? *sum : new_empty(x, {x.size(0), weight.size(0)}, x.scalar_type());
  if (sum) {
    add_product(out, out);
  } else if (bias) {
    add_product(out, *bias);
  } else {
    check(aoti_torch_cuda_mm_out(out.get(), x.get(), columns.get()) == 0, kOp, ": mm failed");
  }
  return out;
}

struct Stack {
  const std::vector<Tensor>& weights;
  const std::vector<int64_t>& forms;  // of the four products of each layer; none on the CPU
  double eps;
  bool plus_one;
  int64_t gate;

  // A weight of a layer; none if the tensor has no elements.
  std::optional<Tensor> at(int64_t layer, Weight weight) const {
    const Tensor& tensor = weights[layer * kWeights + weight];
    return tensor.numel() ? std::optional(tensor) : std::nullopt;
  }
  Form form(int64_t layer, Weight weight) const {
    if (forms.empty()) return kKernel;
    const int64_t product = weight == kQkv ? 0 : weight == kOut ? 1 : weight == kGateUp ? 2 : 3;
    return static_cast<Form>(forms[4 * layer + product]);
  }
  // The product of a layer's normalised rows.
  Tensor behind_norm(Tensor x, int64_t layer, Weight norm, Weight weight, Weight bias, int64_t gate) const {
    const Tensor& by = weights[layer * kWeights + weight];
    std::optional<Tensor> fused = at(layer, norm);
    const Form how = form(layer, weight);
    if (how != kKernel) {
      x = add_rms_norm_op(x, std::nullopt, std::nullopt, *fused, eps, plus_one);
      fused = std::nullopt;
    }
    if (how != kSteps) return linear_op(x, by, at(layer, bias), fused, eps, plus_one, gate, std::nullopt, true);
    const Tensor product = torch_product(x, by, at(layer, bias), std::nullopt);
    return gate ? gated_op(product, gate - 1) : product;
  }
  // The residual stream after a sublayer, whose output may pass a norm of its own. With `overwrites` it may take the
  // place of `hidden`.
  Tensor add(const Tensor& hidden, const Tensor& x, int64_t layer, Weight weight, Weight bias, Weight after,
             bool overwrites) const {
    const Tensor& by = weights[layer * kWeights + weight];
    const auto norm = at(layer, after), shift = at(layer, bias);
    const bool steps = form(layer, weight) == kSteps;
    if (!norm && !(steps && shift)) {
      if (steps) return torch_product(x, by, shift, overwrites ? hidden : copy(hidden));
      return linear_op(x, by, shift, std::nullopt, eps, plus_one, 0, hidden, true);
    }
    const Tensor update = steps ? torch_product(x, by, shift, std::nullopt)
                                : linear_op(x, by, shift, std::nullopt, eps, plus_one, 0, std::nullopt, true);
    const Tensor sum = overwrites ? hidden : copy(hidden);
    // The call also returns a norm of the sum, which nothing uses here.
    const Tensor normed = add_rms_norm_op(sum, update, norm, norm ? *norm : *at(layer, kMlpNorm), eps, plus_one);
    after_kernels([update, normed] {});
    return sum;
  }
  static Tensor copy(const Tensor& x) {
    if (!x.is_cpu()) return torch::stable::clone(x);
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
    std::vector<Tensor> tables, std::vector<Tensor> rotary, std::vector<Tensor> bounds, int64_t kv_len,
    std::vector<Tensor> plans, std::vector<int64_t> forms, std::vector<int64_t> taps, double eps, bool plus_one,
    int64_t gate, double scale, std::optional<double> softcap, bool exact) {
  const int64_t layers = kinds.size();
  const bool on_gpu = !hidden.is_cpu();
  check(hidden.dim() == 2 && int64_t(weights.size()) == layers * kWeights && int64_t(k_caches.size()) == layers &&
            int64_t(v_caches.size()) == layers && bounds.size() == 2 * rotary.size(),
        kOp, ": hidden must be [T, H], with ", int64_t(kWeights), " weights and two caches for each layer");
  for (const auto* where : {&positions, &places, &pages, &tables, &plans}) {
    check(2 * where->size() == rotary.size(), kOp, ": positions, places, pages, tables and plans are needed for each kind");
  }
  check(int64_t(forms.size()) == (on_gpu ? 4 * layers : 0), kOp, ": on a GPU four forms are needed for each layer");
  const Stack stack{weights, forms, eps, plus_one, gate};
  Tensor tapped = new_empty(hidden, {hidden.size(0), int64_t(taps.size()), hidden.size(1)}, hidden.scalar_type());
  std::vector<AtenTensorHandle> outputs(taps.size());  // on a GPU one kernel puts them side by side in the end
  std::optional<CpuQueue> queue;
  if (!on_gpu) queue.emplace();
  int64_t bytes = 0;
  std::vector<Tensor> kept{hidden};  // what must not be overwritten: the argument, and outputs that are tapped
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t kind = kinds[i];
    check(0 <= kind && 2 * kind < int64_t(rotary.size()), kOp, ": layer ", i, " is of kind ", kind);
    const Tensor *cos_sin = &rotary[2 * kind], *mask = &bounds[4 * kind];
    const auto plan = plans[kind].numel() ? std::optional(plans[kind]) : std::nullopt;
    const Tensor projected = stack.behind_norm(hidden, i, kAttentionNorm, kQkv, kQkvBias, 0);
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
                                                 mask[3], kv_len, tables[kind], plan, exact, on_gpu, scale, softcap);
    const Tensor rows =
        torch::stable::view(torch::stable::transpose(attended, 1, 2), {hidden.size(0), attended.numel() / hidden.size(0)});
    const Tensor middle = stack.add(hidden, rows, i, kOut, kOutBias, kAfterAttention,
                                    on_gpu && kept.back().get() != hidden.get());
    const Tensor inner = stack.behind_norm(middle, i, kMlpNorm, kGateUp, kGateUpBias, gate);
    const Tensor after = stack.add(middle, inner, i, kDown, kDownBias, kAfterMlp, on_gpu);
    after_kernels([hidden, projected, queries, attended, middle, inner] {});
    hidden = after;
    for (size_t at = 0; at < taps.size(); ++at) {
      if (taps[at] != i) continue;
      if (on_gpu) {
        kept.push_back(hidden);
        outputs[at] = hidden.get();
        continue;
      }
      after_kernels([hidden, to = torch::stable::select(tapped, 1, at)]() mutable { torch::stable::copy_(to, hidden); });
    }
    if (on_gpu) continue;
    for (const Tensor& x : {projected, queries, attended, middle, inner, hidden}) bytes += x.numel() * x.element_size();
    if (bytes < kMostBytes && i + 1 < layers) continue;
    queue->run();
    bytes = 0;
  }
  if (on_gpu && !taps.empty()) {
    AtenTensorHandle joined;
    check(aoti_torch_cuda_cat(outputs.data(), outputs.size(), 1, &joined) == 0, kOp, ": cat failed");
    tapped = torch::stable::view(Tensor(joined), {hidden.size(0), int64_t(taps.size()), hidden.size(1)});
  }
  return {hidden, tapped};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "run_layers(Tensor hidden, Tensor[] weights, int[] kinds, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, "
      "Tensor[] positions, Tensor[] places, Tensor[] pages, Tensor[] tables, Tensor[] rotary, Tensor[] bounds, "
      "int kv_len, Tensor[] plans, int[] forms, int[] taps, "
      "float eps, bool plus_one, int gate, float scale, float? softcap, bool exact) -> (Tensor output, Tensor tapped)");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) { m.impl("run_layers", TORCH_BOX(&run_layers)); }

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("run_layers", TORCH_BOX(&run_layers)); }

}  // namespace dflash
