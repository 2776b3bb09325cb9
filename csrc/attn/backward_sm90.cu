// block_attn's backward on Hopper, with wgmma and TMA, for head dimensions up to 128.
//
// A block holds a tile of 128 keys and values in shared memory, while the tiles of rows that see it pass through a ring
// of stages. Warpgroup 0 is the producer (sm90/backward_producer.h): one of its warps finds these tiles of rows in the
// table that backward_prepare wrote, and two threads of other warps start the TMA loads of keys and of rows.
//
// The other two warpgroups are the consumers (sm90/backward_consumer.h), and each owns 64 of the keys. A consumer
// computes the transposed scores S^T = K Q^T and dP^T = V dO^T, adds P^T dO to dV and dS^T Q to dK in registers, and
// writes dS^T to shared memory. From there both consumers compute dQ = dS K, half of the columns each, which the copy
// engine adds to a float32 sum in global memory.
//
// These sums decide the speed, and must stay in the L2 cache. So key heads are taken in sections, as many at a time as
// the cache holds queries and sums of. backward_deal_sm90 shares the work of a section out to the blocks. Gradients of
// a tile of keys that several blocks share are added to float32 sums too. A block that has ended its share of a section
// rounds a part of the sums of dQ of the section before (sm90/backward_rounding.h).
#include <algorithm>

#include "attn/kernels.h"
#include "attn/sm90/backward_consumer.h"
#include "attn/sm90/backward_launch.h"
#include "attn/sm90/backward_producer.h"
#include "attn/sm90/block_memory.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm90 {
namespace {

template <class T, int kDim, bool kIsCapped>
__global__ void __launch_bounds__(BackwardTiling<kDim>::kThreads, 1)
    block_attn_backward_sm90(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardLaunch launch) {
  using Tiling = BackwardTiling<kDim>;
  const auto [shared, memory] = begin_block<BackwardShared<Tiling>, Tiling::kBytes>(p);
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_dec<Tiling::kProducerRegisters>();
    BackwardProducer<Tiling> producer(p, launch, shared, memory);
    if (threadIdx.x == 0) producer.load_items();
    if (threadIdx.x / 32 == 1) producer.find_all_rows();
    if (threadIdx.x == 64) producer.load_rows();
    if (threadIdx.x == 96) producer.add_grad_q();
  } else {
    setmaxnreg_inc<Tiling::kConsumerRegisters>();
    BackwardConsumer<T, Tiling, kIsCapped>(p, launch, shared, memory).run();
  }
}

template <class T, int kDim>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
  using Tiling = BackwardTiling<kDim>;
  LaunchShape shape{p.blocks, Tiling::kThreads, Tiling::kBytes};
  shape.is_cooperative = true;  // blocks wait for each other
  return launch_backward_kernel(block_attn_backward_sm90<T, kDim, false>, block_attn_backward_sm90<T, kDim, true>,
                                shape, p, Tiling::kKeys, Tiling::kConsumerKeys, stream);
}

const char* launch_main(const BackwardParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return p.head_dim <= 64 ? launch_backward<T, 64>(p, stream) : launch_backward<T, 128>(p, stream);
  });
}

}  // namespace
}  // namespace device::sm90

uint32_t backward_sm90_misses(const BackwardParams& p, bool deterministic) {
  if (!hopper_kernels_serve() || p.q_len == 0 || p.kv_len == 0) return kNoSuchKernel;
  const auto reads_rows = [&](const void* data, const HeadStrides& strides) {
    return copy_engine_reads(query_box(p, data, strides, 1));
  };
  const auto reads_keys = [&](const void* data, const HeadStrides& strides) {
    return copy_engine_reads(key_box(p, data, strides, 1));
  };
  const bool reads_all = reads_rows(p.q, p.q_strides) && reads_rows(p.grad_out, p.grad_out_strides) &&
                         reads_rows(p.grad_q, p.grad_q_strides) && reads_keys(p.k, p.k_strides) &&
                         reads_keys(p.v, p.v_strides) && reads_keys(p.grad_k, p.grad_k_strides) &&
                         reads_keys(p.grad_v, p.grad_v_strides);
  const bool has_turns = p.kv_len <= kMaxDeterministicKeys;
  return (reads_all ? 0 : kBackwardLayout) | (deterministic && !has_turns ? kBackwardDeterministic : 0);
}

void backward_sm90_layout(BackwardParams& p, void* stream) {
  // The L2 cache keeps about this much of queries, outputs' gradients and sums of dQ beside the data that streams
  // through it.
  constexpr int64_t kCachedBytes = 36 << 20;
  p.adds_to_zeros = p.head_dim > 128;
  p.tile_keys = hopper_backward_keys(p.head_dim);
  p.key_tiles = tiles_of(p.kv_len, p.tile_keys);
  p.blocks = multiprocessors_of(static_cast<cudaStream_t>(stream)) / hopper_backward_cluster(p.head_dim);
  const int64_t heads = p.batch * p.kv_heads, groups = p.heads / p.kv_heads / p.fold;
  const int64_t head_bytes = groups * p.row_tiles * p.tile_rows * p.tile_dim * (2 + 2 + 4);
  p.section_heads = std::clamp<int64_t>(kCachedBytes / head_bytes, 1, heads);
  p.sections = (heads + p.section_heads - 1) / p.section_heads;
}

const char* backward_sm90(const BackwardParams& p, void* stream) {
  using Launch = const char* (*)(const BackwardParams&, void*);
  const Launch main = p.head_dim <= 128 ? device::sm90::launch_main : backward_wide_sm90;
  for (const Launch launch : {backward_deal_sm90, main}) {
    if (const char* const error = launch(p, stream)) return error;
  }
  return p.head_dim <= 128 ? nullptr : backward_finish_sm90(p, stream);
}

}  // namespace dflash
