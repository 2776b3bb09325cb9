// What the attention operators share between CPU and GPU.
#pragma once

#include <optional>

#include "attn/backward.h"
#include "attn/decode.h"
#include "attn/params.h"
#include "common/tensor.h"

namespace dflash {

struct Mask {
  const Tensor &ctx_lo, &ctx_hi, &blk_lo, &blk_hi;
};

inline Intervals intervals(const char* op, const Mask& mask, int64_t batch, int64_t q_len) {
  const auto bound = [&](const Tensor& x) {
    check(x.scalar_type() == ScalarType::Int && x.dim() == 2 && (x.size(0) == 1 || x.size(0) == batch) &&
              x.size(0) == mask.ctx_lo.size(0) && x.size(1) == q_len && x.is_contiguous() &&
              same_device(x, mask.ctx_lo),
          op, ": the mask's bounds must be contiguous int32 [1 or ", batch, ", ", q_len, "], of one shape");
    return static_cast<const int32_t*>(x.data_ptr());
  };
  return {bound(mask.ctx_lo), bound(mask.ctx_hi), bound(mask.blk_lo), bound(mask.blk_hi),
          mask.ctx_lo.size(0) == 1 ? 0 : q_len};
}

// Run the kernels on the GPU of q. `plan` is the result of block_attn_plan, if there is one.
void run_forward_on_gpu(AttentionForwardParams& p, const Tensor& q, const Mask& mask, const std::optional<Tensor>& plan);
void run_backward_on_gpu(BackwardParams& p, const Tensor& q, bool deterministic);
void run_decode_on_gpu(DecodeParams& p, const Tensor& q, const Mask& mask, const std::optional<Tensor>& plan);

}  // namespace dflash
