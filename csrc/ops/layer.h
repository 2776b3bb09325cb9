// The operators of which a layer is made, for those that run whole layers. dflash_ext/ops documents their semantics.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace dflash {

Tensor linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm, double norm_eps,
                 bool norm_plus_one, int64_t gate, std::optional<Tensor> residual, bool constant_weight);

Tensor add_rms_norm_op(Tensor residual, std::optional<Tensor> update, std::optional<Tensor> update_norm, Tensor norm,
                       double eps, bool plus_one);

Tensor gated_op(Tensor gate_up, int64_t activation);

Tensor rotate_to_cache_op(Tensor projected, Tensor k_cache, Tensor v_cache, Tensor positions, Tensor places,
                          Tensor caches, Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
                          std::optional<Tensor> k_norm, double eps, bool plus_one);

Tensor block_attn_decode_op(Tensor q, Tensor k_cache, Tensor v_cache, Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo,
                            Tensor blk_hi, int64_t kv_len, std::optional<Tensor> block_table,
                            std::optional<Tensor> plan, bool exact, bool constant_context,
                            std::optional<double> scale, std::optional<double> softcap);

}  // namespace dflash
