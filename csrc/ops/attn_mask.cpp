// The operator behind IntervalMask.decode.
#include "attn/decode_mask.h"

#include <algorithm>

#include "common/tensor.h"

namespace dflash {

namespace {

constexpr const char* kOp = "decode_mask";

// Lengths come from a tensor [1 or B], or are `value` for all entries. `entries` becomes B.
Lengths lengths_of(const char* name, const std::optional<Tensor>& given, int64_t value, const Tensor& cache_lens,
                   int64_t& entries) {
  if (!given) return {nullptr, false, 0, value};
  const ScalarType dtype = given->scalar_type();
  check(given->dim() == 1 && (dtype == ScalarType::Int || dtype == ScalarType::Long), kOp, ": ", name,
        " must be int32 or int64 [B]");
  check(same_device(*given, cache_lens), kOp, ": ", name, " must be on the device of cache_lens");
  const int64_t size = given->size(0);
  check(size == 1 || entries == 1 || size == entries, kOp, ": ", name, " is for ", size, " rows of the batch, others for ",
        entries);
  if (size != 1) entries = size;
  return {given->data_ptr(), dtype == ScalarType::Long, size == 1 ? 0 : given->stride(0), 0};
}

BlockWindow window_of(std::optional<int64_t> window, int64_t convention) {
  if (!window) return BlockWindow::kNone;
  check(*window > 0 && 0 <= convention && convention <= 2, kOp, ": window is ", *window, ", convention ", convention,
        "; at least 1, and 0 to 2, are needed");
  return BlockWindow(1 + convention);
}

Tensor decode_mask(Tensor cache_lens, std::optional<Tensor> q_lens, std::optional<Tensor> kv_starts, int64_t q_len,
                   int64_t kv_start, int64_t block_len, int64_t kv_len, bool causal, std::optional<int64_t> window,
                   int64_t convention) {
  check(block_len >= 0 && 0 <= kv_len && kv_len < int64_t(1) << 31, kOp, ": ", block_len, " rows over ", kv_len,
        " keys are not supported");
  DecodeMaskParams p{};
  p.entries = 1;
  p.cache_lens = lengths_of("cache_lens", cache_lens, 0, cache_lens, p.entries);
  p.q_lens = lengths_of("q_lens", q_lens, q_len, cache_lens, p.entries);
  p.kv_start = lengths_of("kv_start", kv_starts, kv_start, cache_lens, p.entries);
  p.block_len = block_len;
  p.kv_len = kv_len;
  p.causal = causal;
  p.kind = window_of(window, convention);
  p.window = std::min(window.value_or(1), 2 * kFarKey);  // it then hides nothing, wherever the cache ends
  Tensor bounds = new_empty(cache_lens, {4, p.entries, block_len}, ScalarType::Int);
  if (p.entries == 0 || block_len == 0) return bounds;
  p.bounds = static_cast<int32_t*>(bounds.data_ptr());
  if (cache_lens.is_cpu()) {
    for (int64_t entry = 0; entry < p.entries; ++entry) {
      for (int64_t slot = 0; slot < block_len; ++slot) set_decode_bounds(p, entry, slot);
    }
    return bounds;
  }
  DFLASH_RUN_ON_GPU(kOp, decode_mask_sm80, p, cache_lens);
  return bounds;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "decode_mask(Tensor cache_lens, Tensor? q_lens, Tensor? kv_starts, SymInt q_len, SymInt kv_start, "
      "SymInt block_len, SymInt kv_len, bool causal, SymInt? window, int convention) -> Tensor bounds");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) { m.impl("decode_mask", TORCH_BOX(&decode_mask)); }

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("decode_mask", TORCH_BOX(&decode_mask)); }

}  // namespace dflash
