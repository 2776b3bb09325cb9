// Operators of the attention family; dflash_ext/ops/attention.py documents the semantics.
#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

#include "common/cpu.h"
#include "ops/attn.h"
#include "ops/layer.h"

namespace dflash {

DFLASH_CPU_KERNEL(AttentionForwardParams, block_attn)
DFLASH_CPU_KERNEL(AttentionForwardParams, block_attn_combine)
DFLASH_CPU_KERNEL(AttentionBackwardParams, block_attn_backward)
DFLASH_CPU_KERNEL(AttentionBackwardParams, block_attn_backward_keys)

namespace {

// A cache is read in parts of this many keys, always cut at the same positions, so that a row's result does not depend
// on what else is in the batch.
constexpr int64_t kSplitLen = 1024;

// The number of pieces of work. It is enough for as many threads; more pieces would cost memory and sums. It does not
// depend on the number of threads, so that gradients do not either.
constexpr int64_t kBackwardItems = 16;

HeadStrides head_strides(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 4, op, ": ", name, " has ", x.dim(), " dimensions; 4 are needed");
  check(x.stride(3) == 1 || x.numel() == 0, op, ": the last dimension of ", name, " has stride ", x.stride(3),
        "; 1 is needed");
  return {x.stride(0), x.stride(1), x.stride(2)};
}

// Returns the end of the last interval.
int64_t end_of(const Intervals& mask, int64_t rows) {
  int32_t end = 0;
  for (int64_t i = 0; i < rows; ++i) end = std::max({end, mask.ctx_hi[i], mask.blk_hi[i]});
  return end;
}

// Sets the factor of the scores, which is D ** -0.5 by default, and their softcap, where 0 means none.
void set_scaling(const char* op, AttentionParams& p, std::optional<double> scale, std::optional<double> softcap) {
  p.scale = scale.value_or(std::pow(double(p.head_dim), -0.5));
  check(-1e30 < p.scale && p.scale < 1e30, op, ": scale is ", p.scale, "; a number of float32's size is needed");
  check(!softcap || (1e-30 < *softcap && *softcap < 1e30), op, ": softcap is ", softcap.value_or(0),
        "; a positive number of float32's size is needed");
  p.softcap = softcap.value_or(0);
}

// k and v are [B or pages, Hkv, Lk or page_size, D], as their sizes and strides say.
void set_inputs(const char* op, AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Mask& mask,
                std::optional<double> scale, std::optional<double> softcap) {
  p.dtype = dtype_of(op, "q", q);
  p.q_strides = head_strides(op, "q", q);
  p.k_strides = head_strides(op, "k", k);
  p.v_strides = head_strides(op, "v", v);
  for (const Tensor* x : {&k, &v}) {
    check(x->scalar_type() == q.scalar_type() && same_device(*x, q), op, ": k and v must have q's dtype and device");
    check(x->size(3) == q.size(3), op, ": head_dim of k and v is ", x->size(3), ", of q ", q.size(3));
  }
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.q_len = q.size(2);
  p.head_dim = q.size(3);
  check(p.head_dim % 8 == 0 && 8 <= p.head_dim && p.head_dim <= kMaxHeadDim, op, ": head_dim is ", p.head_dim,
        "; multiples of 8 up to ", kMaxHeadDim, " are supported");
  set_scaling(op, p, scale, softcap);
  check(same_device(mask.ctx_lo, q), op, ": the mask must be on q's device");
  p.mask = intervals(op, mask, p.batch, p.q_len);
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
}

void check_heads(const char* op, const AttentionParams& p) {
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, op, ": ", p.heads, " query heads are no multiple of ", p.kv_heads,
        " key heads");
}

// Runs a kernel whose threads share `items` of work. Each thread has `scratch` numbers of its own.
template <class Params>
void run_items(const CpuKernel<Params>& kernel, Params& p, const Tensor& q, int64_t items, int64_t scratch) {
  if (items == 0) return;
  uint32_t threads = 1;
  check(torch_get_num_threads(&threads) == 0, "torch's get_num_threads failed");
  const int64_t used = std::min<int64_t>(threads, items);
  const Tensor memory = new_empty(q, {used * scratch}, real_of(q));
  const auto taken = std::make_shared<int64_t>(0);
  p.scratch = memory.data_ptr();
  p.taken = taken.get();
  run_on_cpu(kernel, p, used, 1);
  after_kernels([memory, taken] {});
}

void run_forward(AttentionForwardParams& p, const Tensor& q) {
  run_items(block_attn, p, q, p.batch * p.kv_heads * row_tiles_of(p) * p.splits, forward_scratch(p.head_dim));
}

void set_keys(const char* op, AttentionParams& p, const Tensor& k, const Tensor& v) {
  p.kv_heads = k.size(1);
  p.kv_len = k.size(2);
  check(k.size(0) == p.batch && v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.kv_len, op,
        ": k and v must be [", p.batch, ", Hkv, Lk, ", p.head_dim, "], of one shape");
  check_heads(op, p);
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo,
                                   Tensor blk_hi, int64_t kv_len, std::optional<Tensor> plan,
                                   std::optional<double> scale, std::optional<double> softcap,
                                   bool /*deterministic: of the gradients*/) {
  constexpr const char* kOp = "block_attn";
  const Mask mask{ctx_lo, ctx_hi, blk_lo, blk_hi};
  AttentionForwardParams p{};
  set_inputs(kOp, p, q, k, v, mask, scale, softcap);
  set_keys(kOp, p, k, v);
  check(kv_len == p.kv_len, kOp, ": the mask is over ", kv_len, " keys, k has ", p.kv_len);
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = new_empty(q, {p.batch, p.heads, p.q_len}, real_of(q));
  p.out = out.data_ptr();
  p.out_strides = head_strides(kOp, "out", out);
  p.lse = lse.data_ptr();
  if (q.is_cpu()) {
    p.splits = 1;
    p.split_len = p.kv_len;
    run_forward(p, q);
  } else {
    run_forward_on_gpu(p, q, mask, plan);
  }
  return {out, lse};
}

void run_backward_on_cpu(AttentionBackwardParams& p, const Tensor& q) {
  const int64_t heads = p.batch * p.kv_heads;
  if (heads == 0) return;
  p.splits = std::clamp<int64_t>((kBackwardItems + heads - 1) / heads, 1, std::max<int64_t>(1, row_tiles_of(p)));
  Tensor partial = new_empty(q, {p.splits * heads * 2 * padded(p.kv_len) * padded(p.head_dim)}, real_of(q));
  p.partial = partial.data_ptr();
  run_items(block_attn_backward, p, q, heads * p.splits, backward_scratch(p.head_dim));
  if (p.kv_len > 0) run_on_cpu(block_attn_backward_keys, p, heads * p.kv_len, 64);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k,
                                            Tensor v, Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo, Tensor blk_hi,
                                            Tensor out, Tensor lse, std::optional<double> scale,
                                            std::optional<double> softcap, bool deterministic) {
  constexpr const char* kOp = "block_attn_backward";
  BackwardParams p{};
  set_inputs(kOp, p, q, k, v, {ctx_lo, ctx_hi, blk_lo, blk_hi}, scale, softcap);
  set_keys(kOp, p, k, v);
  for (const Tensor* x : {&out, &grad_out}) {
    check(x->dim() == 4 && x->size(0) == p.batch && x->size(1) == p.heads && x->size(2) == p.q_len &&
              x->size(3) == p.head_dim && x->scalar_type() == q.scalar_type() && same_device(*x, q),
          kOp, ": out and its gradient must be like q");
  }
  for (const Tensor* x : {&lse, grad_lse ? &*grad_lse : &lse}) {
    check(x->dim() == 3 && x->size(0) == p.batch && x->size(1) == p.heads && x->size(2) == p.q_len &&
              x->scalar_type() == real_of(q) && x->is_contiguous() && same_device(*x, q),
          kOp, ": lse and its gradient must be contiguous [", p.batch, ", ", p.heads, ", ", p.q_len, "]");
  }
  p.out = out.data_ptr();
  p.out_strides = head_strides(kOp, "out", out);
  p.grad_out = grad_out.data_ptr();
  p.grad_out_strides = head_strides(kOp, "grad_out", grad_out);
  p.lse = lse.data_ptr();
  p.grad_lse = optional_data<void>(grad_lse);

  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k),
         grad_v = torch::stable::empty_like(v);
  p.grad_q = grad_q.data_ptr();
  p.grad_k = grad_k.data_ptr();
  p.grad_v = grad_v.data_ptr();
  p.grad_q_strides = head_strides(kOp, "grad_q", grad_q);
  p.grad_k_strides = head_strides(kOp, "grad_k", grad_k);
  p.grad_v_strides = head_strides(kOp, "grad_v", grad_v);

  if (q.is_cpu()) {
    run_backward_on_cpu(p, q);
  } else {
    p.entries = ctx_lo.size(0);
    run_backward_on_gpu(p, q, deterministic);
  }
  return {grad_q, grad_k, grad_v};
}

// The caches are contiguous, [B, Hkv, S, D], or with a block table in pages, [pages, page_size, Hkv, D].
void set_caches(const char* op, AttentionParams& p, const Tensor& k_cache, const Tensor& v_cache, int64_t kv_len,
                const std::optional<Tensor>& block_table) {
  for (int i = 0; i < 3; ++i) check(k_cache.size(i) == v_cache.size(i), op, ": the two caches must have one shape");
  int64_t capacity;
  if (block_table) {
    check(block_table->scalar_type() == ScalarType::Int && block_table->dim() == 2 &&
              block_table->size(0) == p.batch && block_table->is_contiguous() && same_device(*block_table, k_cache),
          op, ": block_table must be contiguous int32 [", p.batch, ", max_pages]");
    p.pages = {static_cast<const int32_t*>(block_table->data_ptr()), block_table->size(1), k_cache.size(1),
               k_cache.size(0), nullptr};
    for (HeadStrides* strides : {&p.k_strides, &p.v_strides}) std::swap(strides->head, strides->row);
    p.kv_heads = k_cache.size(2);
    capacity = p.pages.max_pages * p.pages.page_size;
  } else {
    check(k_cache.size(0) == p.batch, op, ": the caches are for batch ", k_cache.size(0), ", q for ", p.batch);
    p.kv_heads = k_cache.size(1);
    capacity = k_cache.size(2);
  }
  check(0 <= kv_len && kv_len <= capacity, op, ": the mask is over ", kv_len, " keys, the cache has ", capacity);
  check_heads(op, p);
  p.kv_len = kv_len;
}

void run_decode_on_cpu(AttentionForwardParams& p, const Tensor& q) {
  constexpr const char* kOp = "block_attn_decode";
  const auto missing = std::make_shared<bool>(false);
  p.pages.missing = missing.get();
  p.kv_len = std::min(p.kv_len, end_of(p.mask, p.mask.batch == 0 ? p.q_len : p.batch * p.q_len));
  p.splits = std::max<int64_t>(1, (p.kv_len + kSplitLen - 1) / kSplitLen);
  p.split_len = kSplitLen;
  const int64_t rows = p.batch * p.heads * p.q_len;
  std::optional<Tensor> partial_out, partial_stats;
  if (p.splits > 1) {
    partial_out = new_empty(q, {p.splits * rows * p.head_dim}, real_of(q));
    partial_stats = new_empty(q, {p.splits * rows * 2}, real_of(q));
  }
  p.partial_out = optional_data<void>(partial_out);
  p.partial_stats = optional_data<void>(partial_stats);
  run_forward(p, q);
  if (p.splits > 1 && rows > 0) run_on_cpu(block_attn_combine, p, rows, 64);
  after_kernels([kOp, missing, pages = p.pages.count, partial_out, partial_stats] {
    check(!*missing, kOp, ": a row sees keys whose entry in block_table is not one of the ", pages, " pages");
  });
}

}  // namespace

Tensor block_attn_decode_op(Tensor q, Tensor k_cache, Tensor v_cache, Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo,
                            Tensor blk_hi, int64_t kv_len, std::optional<Tensor> block_table,
                            std::optional<Tensor> plan, bool exact, bool constant_context,
                            std::optional<double> scale, std::optional<double> softcap) {
  constexpr const char* kOp = "block_attn_decode";
  const Mask mask{ctx_lo, ctx_hi, blk_lo, blk_hi};
  Tensor out = torch::stable::empty_like(q);
  const auto run = [&](auto params, auto kernel) {
    set_inputs(kOp, params, q, k_cache, v_cache, mask, scale, softcap);
    set_caches(kOp, params, k_cache, v_cache, kv_len, block_table);
    params.out = out.data_ptr();
    params.out_strides = head_strides(kOp, "out", out);
    kernel(params);
  };
  if (q.is_cpu()) {
    run(AttentionForwardParams{}, [&](AttentionForwardParams& p) { run_decode_on_cpu(p, q); });
  } else {
    run(DecodeParams{}, [&](DecodeParams& p) {
      p.exact = exact;
      p.context_is_constant = constant_context;
      run_decode_on_gpu(p, q, mask, plan);
    });
  }
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "block_attn(Tensor q, Tensor k, Tensor v, Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo, Tensor blk_hi, "
      "SymInt kv_len, Tensor? plan, float? scale, float? softcap, bool deterministic) -> (Tensor out, Tensor lse)");
  m.def(
      "block_attn_plan(Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo, Tensor blk_hi, int kv_len, int heads, "
      "int kv_heads, int head_dim, bool decode) -> Tensor");
  m.def(
      "block_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor ctx_lo, "
      "Tensor ctx_hi, Tensor blk_lo, Tensor blk_hi, Tensor out, Tensor lse, float? scale, float? softcap, "
      "bool deterministic) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "block_attn_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo, "
      "Tensor blk_hi, SymInt kv_len, Tensor? block_table, Tensor? plan, bool exact, bool constant_context, "
      "float? scale, float? softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("block_attn", TORCH_BOX(&forward));
  m.impl("block_attn_backward", TORCH_BOX(&backward));
  m.impl("block_attn_decode", TORCH_BOX(&block_attn_decode_op));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("block_attn", TORCH_BOX(&forward));
  m.impl("block_attn_backward", TORCH_BOX(&backward));
  m.impl("block_attn_decode", TORCH_BOX(&block_attn_decode_op));
}

}  // namespace dflash
