// Operators of the layer family. dflash_ext/ops/layer.py documents the semantics.
#include "ops/layer.h"

#include <vector>

#include "common/cpu.h"
#include "layer/params.h"
#include "ops/layer_common.h"

namespace dflash {

DFLASH_CPU_KERNEL(AddRmsNormParams, add_rms_norm)
DFLASH_CPU_KERNEL(RotateToCacheParams, rotate_to_cache)
DFLASH_CPU_KERNEL(GatedParams, gated)
DFLASH_CPU_KERNEL(AddHalvesParams, add_halves)

Tensor add_rms_norm_op(Tensor residual, std::optional<Tensor> update, std::optional<Tensor> update_norm, Tensor norm,
                       double eps, bool plus_one) {
  constexpr const char* kOp = "add_rms_norm";
  AddRmsNormParams p = norm_of<AddRmsNormParams>(kOp, "residual", residual, "norm", norm, eps);
  const ScalarType dtype = residual.scalar_type();
  if (update) p.update_stride = stride_of(kOp, "update", *update, residual, p.rows, p.width);
  if (update_norm) check_tensor(kOp, "update_norm", *update_norm, residual, dtype, {p.width});
  check(update || !update_norm, kOp, ": update_norm needs an update");
  Tensor out = torch::stable::empty_like(residual);
  if (p.rows == 0 || p.width == 0) return out;
  p.residual = p.total = residual.data_ptr();
  p.update = optional_data<void>(update);
  p.update_norm = optional_data<void>(update_norm);
  p.norm = norm.data_ptr();
  p.out = out.data_ptr();
  p.plus_one = plus_one;
  if (residual.is_cpu()) {
    run_on_cpu(add_rms_norm, p, p.rows, 1 + 16384 / p.width);
    return out;
  }
  check_width_on_gpu(kOp, residual, p.width, kMostInSharedMemory);
  DFLASH_RUN_ON_GPU(kOp, add_rms_norm_sm80, p, residual);
  return out;
}

namespace {

// The strides of a cache [N, heads, capacity, head_dim], or of queries.
HeadRows head_rows(const char* name, const Tensor& heads) {
  check(heads.dim() == 4 && heads.stride(3) == 1, "rotate_to_cache: the last dimension of ", name,
        " must be contiguous");
  return {heads.data_ptr(), heads.stride(0), heads.stride(1), heads.stride(2)};
}

void check_places(const RotateToCacheParams& p) {
  for (int64_t i = 0; i < p.entries * p.rows; ++i) {
    check(p.positions[i] < p.positions_count, "rotate_to_cache: position ", p.positions[i], " of row ", i / p.rows,
          " is outside the tables of ", p.positions_count, " positions");
    const int32_t cache = p.caches[i / p.rows];
    check(p.places[i] < 0 || (p.places[i] < p.capacity && 0 <= cache && cache < p.cache_count),
          "rotate_to_cache: place ", p.places[i], " of cache ", int64_t(cache), " does not exist: there are ",
          p.cache_count, " caches of ", p.capacity, " places");
  }
}

}  // namespace

Tensor rotate_to_cache_op(Tensor projected, Tensor k_cache, Tensor v_cache, Tensor positions, Tensor places,
                          Tensor caches, Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
                          std::optional<Tensor> k_norm, double eps, bool plus_one) {
  constexpr const char* kOp = "rotate_to_cache";
  RotateToCacheParams p{};
  p.dtype = dtype_of(kOp, "projected", projected);
  const ScalarType dtype = projected.scalar_type(), real = real_of(projected);
  check(positions.dim() == 2 && cos.dim() == 2 && projected.dim() == 2, kOp,
        ": projected, positions and cos must have two dimensions");
  p.keys = head_rows("k_cache", k_cache);
  p.values = head_rows("v_cache", v_cache);
  p.entries = positions.size(0);
  p.rows = positions.size(1);
  p.cache_count = k_cache.size(0);
  p.kv_heads = k_cache.size(1);
  p.capacity = k_cache.size(2);
  p.head_dim = k_cache.size(3);
  for (int64_t dim = 0; dim < 4; ++dim) {
    check(v_cache.size(dim) == k_cache.size(dim), kOp, ": k_cache and v_cache differ in shape");
  }
  check(k_cache.scalar_type() == dtype && v_cache.scalar_type() == dtype && same_device(k_cache, projected) &&
            same_device(v_cache, projected),
        kOp, ": the caches must be of the projection's dtype and on its device");
  check(p.head_dim > 0 && p.head_dim <= 512 && projected.size(1) % p.head_dim == 0, kOp, ": a projection of ",
        projected.size(1), " is made of no heads of ", p.head_dim);
  p.heads = projected.size(1) / p.head_dim - 2 * p.kv_heads;
  check(p.heads >= 0, kOp, ": projected has fewer heads than keys and values need");
  p.stride = stride_of(kOp, "projected", projected, projected, p.entries * p.rows, projected.size(1));
  check_tensor(kOp, "positions", positions, projected, ScalarType::Long, {p.entries, p.rows});
  check_tensor(kOp, "places", places, projected, ScalarType::Long, {p.entries, p.rows});
  check_tensor(kOp, "caches", caches, projected, ScalarType::Int, {p.entries});
  p.positions_count = cos.size(0);
  p.angles = cos.size(1);
  check_tensor(kOp, "cos", cos, projected, real, {p.positions_count, p.angles});
  check_tensor(kOp, "sin", sin, projected, real, {p.positions_count, p.angles});
  check(p.positions_count > 0 && 2 * p.angles <= p.head_dim, kOp, ": ", p.angles, " angles do not fit a head of ",
        p.head_dim);
  for (const auto* norm : {&q_norm, &k_norm}) {
    if (*norm) check_tensor(kOp, "q_norm or k_norm", **norm, projected, dtype, {p.head_dim});
  }
  // [B, R, Hq, D] in memory, so that the attention's output, which has the same layout, is the next product's input.
  Tensor queries = new_empty(projected, {p.entries, p.rows, p.heads, p.head_dim}, dtype);
  queries = torch::stable::transpose(queries, 1, 2);
  if (p.entries * p.rows == 0) return queries;
  p.queries = head_rows("queries", queries);
  p.projected = projected.data_ptr();
  p.q_norm = optional_data<void>(q_norm);
  p.k_norm = optional_data<void>(k_norm);
  p.eps = eps;
  p.plus_one = plus_one;
  p.cos = cos.data_ptr();
  p.sin = sin.data_ptr();
  p.positions = static_cast<const int64_t*>(positions.data_ptr());
  p.places = static_cast<const int64_t*>(places.data_ptr());
  p.caches = static_cast<const int32_t*>(caches.data_ptr());
  if (projected.is_cpu()) {
    check_places(p);
    run_on_cpu(rotate_to_cache, p, p.entries * p.rows, 1 + 16384 / projected.size(1));
  } else {
    check(p.head_dim % (dtype == ScalarType::Float ? 4 : 8) == 0, kOp, ": a head_dim of ", p.head_dim,
          " is not supported on a GPU; multiples of 16 bytes are");
    DFLASH_RUN_ON_GPU(kOp, rotate_to_cache_sm80, p, projected);
  }
  return queries;
}

Tensor gated_op(Tensor gate_up, int64_t activation) {
  constexpr const char* kOp = "gated";
  check(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, kOp, ": gate_up must be [T, 2 * I]");
  check(activation == 0 || activation == 1, kOp, ": activation is ", activation);
  GatedParams p{};
  p.dtype = dtype_of(kOp, "gate_up", gate_up);
  p.rows = gate_up.size(0);
  p.width = gate_up.size(1) / 2;
  p.activation = Activation(activation);
  p.stride = stride_of(kOp, "gate_up", gate_up, gate_up, p.rows, 2 * p.width);
  Tensor out = new_empty(gate_up, {p.rows, p.width}, gate_up.scalar_type());
  if (p.rows == 0 || p.width == 0) return out;
  p.gate = gate_up.data_ptr();
  p.up = static_cast<const char*>(p.gate) + p.width * gate_up.element_size();
  p.out = out.data_ptr();
  if (gate_up.is_cpu()) {
    run_on_cpu(gated, p, p.rows * p.width, 16384);
    return out;
  }
  check_width_on_gpu(kOp, gate_up, p.width);
  DFLASH_RUN_ON_GPU(kOp, gated_sm80, p, gate_up);
  return out;
}

namespace {

// The number of columns of a block's tile (csrc/layer/add_halves_sm80.cu), which lie in one projection.
constexpr int64_t kHalvesColumns = 32;

Tensor add_halves_op(Tensor product, Tensor inner, Tensor halves, std::vector<int64_t> ends,
                     std::vector<int64_t> inner_at, int64_t entries, int64_t first, int64_t gate) {
  constexpr const char* kOp = "add_halves_";
  check(product.dim() == 2 && halves.dim() == 2 && inner.dim() == 2, kOp, ": each tensor must have two dimensions");
  AddHalvesParams p{};
  p.dtype = dtype_of(kOp, "product", product);
  p.rows = product.size(0);
  p.width = product.size(1);
  p.rank = halves.size(1);
  check(entries > 0 && p.rows % entries == 0 && first >= 0, kOp, ": ", p.rows, " rows in ", entries, " entries");
  p.entry_rows = p.rows / entries;
  p.first = first;
  p.stride = stride_of(kOp, "product", product, product, p.rows, p.width);
  p.inner_stride = stride_of(kOp, "inner", inner, product, p.rows, inner.size(1));
  check_tensor(kOp, "halves", halves, product, product.scalar_type(), {p.width, p.rank});
  check(gate >= 0 && gate <= 2, kOp, ": gate is ", gate);
  const int64_t pieces = ends.size(), columns = kHalvesColumns * (gate > 0 ? 2 : 1);
  check(1 <= pieces && pieces <= 3 && pieces == int64_t(inner_at.size()) && ends.back() == p.width, kOp,
        ": 1 to 3 projections are supported, with an end and a place in inner for each");
  p.ends[0] = p.ends[1] = p.width;
  for (int64_t i = 0; i < pieces; ++i) {
    check(ends[i] % kHalvesColumns == 0 && inner_at[i] % 8 == 0 && 0 <= inner_at[i] &&
              inner_at[i] + p.rank <= inner.size(1),
          kOp, ": a projection ends at ", ends[i], " and begins in inner at ", inner_at[i]);
    if (i < 2) p.ends[i] = ends[i];
    p.inner_at[i] = inner_at[i];
  }
  const auto is_aligned = [](const Tensor& x, int64_t stride) {
    return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && stride % 8 == 0;
  };
  check(p.width % columns == 0 && is_aligned(product, p.stride) && is_aligned(inner, p.inner_stride) &&
            is_aligned(halves, 8),
        kOp, ": rows must begin at multiples of 16 bytes, and have a multiple of ", columns, " columns");
  check(p.rank == 16 || p.rank == 32 || p.rank == 64 || p.rank == 128, kOp, ": rank ", p.rank,
        " is not supported; 16, 32, 64 and 128 are");
  Tensor out = new_empty(product, {gate > 0 ? p.rows : 0, p.width / 2}, product.scalar_type());
  if (p.rows == 0) return out;
  p.product = product.data_ptr();
  p.inner = inner.data_ptr();
  p.halves = halves.data_ptr();
  if (gate > 0) {
    p.activation = Activation(gate - 1);
    p.out = out.data_ptr();
  }
  if (product.is_cpu()) {
    run_on_cpu(add_halves, p, p.rows, 1);
  } else {
    check(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kOp,
          ": on a GPU bfloat16 and float16 are supported");
    DFLASH_RUN_ON_GPU(kOp, add_halves_sm80, p, product);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "add_halves_(Tensor(a!) product, Tensor inner, Tensor halves, int[] ends, int[] inner_at, int entries, "
      "int first, int gate) -> Tensor");
  m.def(
      "add_rms_norm(Tensor(a!) residual, Tensor? update, Tensor? update_norm, Tensor norm, float eps, bool plus_one) "
      "-> Tensor");
  m.def(
      "rotate_to_cache(Tensor projected, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor places, "
      "Tensor caches, Tensor cos, Tensor sin, Tensor? q_norm, Tensor? k_norm, float eps, bool plus_one) -> Tensor");
  m.def("gated(Tensor gate_up, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm_op));
  m.impl("rotate_to_cache", TORCH_BOX(&rotate_to_cache_op));
  m.impl("gated", TORCH_BOX(&gated_op));
  m.impl("add_halves_", TORCH_BOX(&add_halves_op));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm_op));
  m.impl("rotate_to_cache", TORCH_BOX(&rotate_to_cache_op));
  m.impl("gated", TORCH_BOX(&gated_op));
  m.impl("add_halves_", TORCH_BOX(&add_halves_op));
}

}  // namespace dflash
