// What the host computes for the kernels of the Hopper backward.
#pragma once

#include <bit>

#include "attn/sm90/backward_tiling.h"
#include "attn/sm90/boxes.h"

namespace dflash::device::sm90 {

// `keys` are those of a tile, and `stored_keys` those whose gradients one warpgroup stores.
inline cudaError_t make_backward_launch(BackwardLaunch* launch, const BackwardParams& p, int64_t keys,
                                        int64_t stored_keys) {
  launch->fold_bits = std::countr_zero(static_cast<unsigned>(p.fold));
  launch->factor = static_cast<float>(p.scale) * kLog2E;
  launch->inverse_cap = p.softcap == 0 ? 0.0f : 1 / (static_cast<float>(p.softcap) * kLog2E);
  launch->groups = static_cast<int>(p.heads / p.fold);
  launch->groups_per_head = static_cast<int>(p.heads / p.kv_heads / p.fold);
  const auto row_box = [&](const void* data, const HeadStrides& strides) {
    return query_box(p, data, strides, p.fold);
  };
  return make_tensor_maps(p.dtype, {{&launch->q, row_box(p.q, p.q_strides)},
                                    {&launch->grad_out, row_box(p.grad_out, p.grad_out_strides)},
                                    {&launch->k, key_box(p, p.k, p.k_strides, keys)},
                                    {&launch->v, key_box(p, p.v, p.v_strides, keys)},
                                    {&launch->grad_k, key_box(p, p.grad_k, p.grad_k_strides, stored_keys)},
                                    {&launch->grad_v, key_box(p, p.grad_v, p.grad_v_strides, stored_keys)}});
}

// Launches the kernel without or with a softcap.
using BackwardKernel = void (*)(const BackwardParams, const BackwardLaunch);
inline cudaError_t launch_backward_kernel(BackwardKernel uncapped, BackwardKernel capped, const LaunchShape& shape,
                                          const BackwardParams& p, int64_t keys, int64_t stored_keys,
                                          cudaStream_t stream) {
  BackwardLaunch launch;
  const cudaError_t status = make_backward_launch(&launch, p, keys, stored_keys);
  return status == cudaSuccess ? launch_kernel(p.softcap == 0 ? uncapped : capped, shape, stream, p, launch) : status;
}

}  // namespace dflash::device::sm90
