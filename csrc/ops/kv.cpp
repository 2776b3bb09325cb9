// Operators of the kv family. dflash_ext/ops/kv.py brings tensors into the form that is expected here and documents
// the semantics.
#include "kv/kernels.h"

#include <vector>

#include "common/cpu.h"
#include "common/tensor.h"

namespace dflash {

DFLASH_CPU_KERNEL(KvWriteParams, kv_write)

namespace {

constexpr const char* kOp = "kv_inject";

// Caches are [batch, heads, capacity, head_dim], or in pages [pages, page_size, heads, head_dim].
std::vector<KvCache> layers_of(const char* name, const std::vector<Tensor>& caches, const Tensor& beside, bool paged) {
  std::vector<KvCache> layers;
  for (const Tensor& cache : caches) {
    bool alike = same_device(cache, beside) && cache.dim() == 4 && cache.scalar_type() == caches[0].scalar_type();
    for (int64_t dim = 0; alike && dim < 4; ++dim) alike = cache.size(dim) == caches[0].size(dim);
    check(alike, kOp, ": ", name, " must be four-dimensional tensors of one shape and dtype on the others' device");
    check(cache.size(3) == 1 || cache.stride(3) == 1, kOp, ": the last dimension of ", name,
          " must be contiguous, its stride is ", cache.stride(3));
    layers.push_back({cache.data_ptr(), cache.stride(0), cache.stride(paged ? 2 : 1), cache.stride(paged ? 1 : 2)});
  }
  return layers;
}

// Checks slots and positions. Tokens with a negative slot are not written, and may have any position.
void check_places(const KvWriteParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const int64_t slot = p.slots[token], position = p.positions[token], row = token / p.length;
    if (slot < 0) continue;
    check(slot < p.capacity, kOp, ": slot ", slot, " of row ", row, ", token ", token % p.length,
          ", is outside the cache of ", p.capacity, " slots");
    check(position >= 0 && position < p.table_length, kOp, ": position ", position, " of row ", row, ", token ",
          token % p.length, ", is outside the tables of ", p.table_length, " positions");
    if (!p.block_table) continue;
    const int32_t page = p.block_table[row * p.max_pages + slot / p.page_size];
    check(page >= 0 && page < p.pages, kOp, ": block_table names page ", page, " of ", p.pages, " for slot ", slot,
          " of row ", row);
  }
}

// Returns the dtype of the norms' or the projections' weights, which a CUDA kernel reads as they are.
DType weights_dtype(const char* name, const Tensor& weights, const Tensor& projected, ScalarType real,
                    std::initializer_list<int64_t> sizes) {
  check_tensor(kOp, name, weights, projected, projected.is_cpu() ? real : weights.scalar_type(), sizes);
  return dtype_of(kOp, name, weights);
}

void run(const KvWriteParams& p, const Tensor& projected) {
  if (p.tokens == 0) return;
  if (projected.is_cpu()) {
    check_places(p);
    // A thread gets at least 16 K numbers. With less, waking it costs more than it saves.
    return run_on_cpu(kv_write, p, p.tokens * p.layers, 1 + 16384 / (2 * p.heads * p.head_dim + 1));
  }
#ifdef DFLASH_EXT_CUDA
  check(p.head_dim <= kMaxKvHeadDim, kOp, ": a head_dim of ", p.head_dim, " is not supported on a GPU, at most ",
        kMaxKvHeadDim, " is");
  check(p.capacity < int64_t(1) << 31, kOp, ": a cache of ", p.capacity, " slots is not supported on a GPU");
  const CudaScope cuda(projected);
  check_launch(kOp, kv_write_sm80(p, cuda.stream()));
#else
  fail(kOp, ": this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)");
#endif
}

void write_caches(Tensor projected, std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, Tensor positions,
                  Tensor slots, Tensor cos, Tensor sin, std::optional<Tensor> bias, std::optional<Tensor> k_norm,
                  std::optional<Tensor> block_table, double norm_eps, bool norm_plus_one, bool norm_after_rope,
                  bool v_norm, bool rope_interleaved) {
  const int64_t layers = k_caches.size();
  check(layers > 0 && v_caches.size() == k_caches.size(), kOp, ": one cache per layer is needed");
  const bool paged = block_table.has_value();
  const Tensor& cache = k_caches[0];
  const auto k_layers = layers_of("k_caches", k_caches, projected, paged);
  const auto v_layers = layers_of("v_caches", v_caches, projected, paged);
  const ScalarType real = real_of(projected);
  check(v_caches[0].scalar_type() == cache.scalar_type() && real_of(cache) == real, kOp,
        ": all caches must be of one dtype, and float64 if and only if the features are");
  check(positions.dim() == 2, kOp, ": positions must be [B, S]");
  const int64_t batch = positions.size(0), length = positions.size(1);

  KvWriteParams p{};
  p.dtype = dtype_of(kOp, "features", projected);
  p.cache_dtype = dtype_of(kOp, "caches", cache);
  p.tokens = batch * length;
  p.length = length;
  p.layers = layers;
  p.heads = cache.size(paged ? 2 : 1);
  p.head_dim = cache.size(3);
  check_tensor(kOp, "projected", projected, projected, projected.scalar_type(),
               {p.tokens, layers * 2 * p.heads * p.head_dim});
  check_tensor(kOp, "positions", positions, projected, ScalarType::Long, {batch, length});
  check_tensor(kOp, "slots", slots, projected, ScalarType::Long, {batch, length});
  p.projected = projected.data_ptr();
  p.positions = static_cast<const int64_t*>(positions.data_ptr());
  p.slots = static_cast<const int64_t*>(slots.data_ptr());

  if (bias) p.bias_dtype = weights_dtype("bias", *bias, projected, real, {layers * 2 * p.heads * p.head_dim});
  if (k_norm) p.k_norm_dtype = weights_dtype("k_norm", *k_norm, projected, real, {layers, p.head_dim});
  p.bias = optional_data<void>(bias);
  p.k_norm = optional_data<void>(k_norm);
  p.norm_eps = norm_eps;
  p.norm_plus_one = norm_plus_one;
  p.norm_after_rope = norm_after_rope;
  p.v_norm = v_norm;

  check(cos.dim() == 2 || (cos.dim() == 3 && cos.size(0) == layers), kOp, ": cos must be [P, R] or [L, P, R]");
  p.table_length = cos.size(cos.dim() - 2);
  p.angles = cos.size(cos.dim() - 1);
  check(2 * p.angles <= p.head_dim, kOp, ": ", p.angles, " angles do not fit a head of ", p.head_dim);
  for (const Tensor* table : {&cos, &sin}) {
    table->dim() == 2 ? check_tensor(kOp, "cos or sin", *table, projected, real, {p.table_length, p.angles})
                      : check_tensor(kOp, "cos or sin", *table, projected, real, {layers, p.table_length, p.angles});
  }
  check(cos.dim() == sin.dim(), kOp, ": cos and sin differ in shape");
  p.by_layer = cos.dim() == 3 ? p.table_length * p.angles : 0;
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.rope_interleaved = rope_interleaved;

  if (paged) {
    p.max_pages = block_table->dim() == 2 ? block_table->size(1) : 0;
    check_tensor(kOp, "block_table", *block_table, projected, ScalarType::Int, {batch, p.max_pages});
    p.page_size = cache.size(1);
  } else {
    check(cache.size(0) == batch, kOp, ": the caches are for batch ", cache.size(0), ", positions for ", batch);
  }
  p.block_table = optional_data<int32_t>(block_table);
  p.k_caches = k_layers.data();
  p.v_caches = v_layers.data();
  p.capacity = paged ? p.max_pages * p.page_size : cache.size(2);
  p.pages = paged ? cache.size(0) : 0;
  run(p, projected);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "kv_write(Tensor projected, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor positions, Tensor slots, "
      "Tensor cos, Tensor sin, Tensor? bias, Tensor? k_norm, Tensor? block_table, float norm_eps, "
      "bool norm_plus_one, bool norm_after_rope, bool v_norm, bool rope_interleaved) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) { m.impl("kv_write", TORCH_BOX(&write_caches)); }

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("kv_write", TORCH_BOX(&write_caches)); }

}  // namespace dflash
