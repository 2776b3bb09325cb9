// block_attn's backward on Hopper for head dimensions above 128.
//
// The gradients of 64 keys and 256 columns in float32 take half of the registers of a multiprocessor. So the work of
// backward_sm90.cu is shared out in another way: a cluster of two blocks holds a tile of keys and values. Up to head
// dimension 256 each block has half of the keys, above it half of the columns. Each of a block's three consumers
// computes another gradient:
//
//   of values:  S^T = K Q^T, the probabilities P, and dV = P^T dO   (sm90/backward_wide_key_consumer.h)
//   of keys:    dP^T = V dO^T, dS = P * (dP - delta), and dK = dS^T Q
//   of queries: dQ = dS K                                           (sm90/backward_wide_query_consumer.h)
//
// P goes from the first to the second through shared memory, and dS from the second to the third. If blocks split keys,
// dS also goes to the other block, and each computes half of the columns of dQ for the keys of both: the additions of
// dQ to float32 sums in global memory limit the speed, and are half as many then. They leave straight from registers.
// If blocks split columns, each computes a part of S^T and dP^T, and they exchange these parts.
//
// The table of row tiles and the deal to clusters are those of backward_sm90.cu. A last launch rounds the sums
// (backward_finish_sm90.cu).
#include "attn/kernels.h"
#include "attn/sm90/backward_launch.h"
#include "attn/sm90/backward_wide_key_consumer.h"
#include "attn/sm90/backward_wide_producer.h"
#include "attn/sm90/backward_wide_query_consumer.h"
#include "attn/sm90/block_memory.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm90 {
namespace {

template <class T, class Tiling, bool kIsCapped>
__global__ void __launch_bounds__(Tiling::kThreads, 1)
    block_attn_backward_wide_sm90(const __grid_constant__ BackwardParams p,
                                  const __grid_constant__ BackwardLaunch launch) {
  const auto [shared, memory] = begin_block<WideBackwardShared<Tiling>, Tiling::kBytes>(p);
  cluster_arrive();
  cluster_wait();  // the other block's barriers are ready
  switch (threadIdx.x / kWarpgroup) {
    case 0:
      setmaxnreg_dec<Tiling::kProducerRegisters>();
      WideBackwardProducer<Tiling>(p, launch, shared, memory).run();
      break;
    case 1:
      setmaxnreg_inc<Tiling::kKeyRegisters>();
      WideKeyConsumer<T, Tiling, false, kIsCapped>(p, launch, shared, memory).run();
      break;
    case 2:
      setmaxnreg_inc<Tiling::kKeyRegisters>();
      WideKeyConsumer<T, Tiling, true, kIsCapped>(p, launch, shared, memory).run();
      break;
    default:
      setmaxnreg_dec<Tiling::kQueryRegisters>();
      WideQueryConsumer<T, Tiling>(p, shared, memory).run();
  }
  cluster_arrive();
  cluster_wait();  // the other block may still send to this one's shared memory
}

template <class T, class Tiling>
cudaError_t launch_wide_backward(const BackwardParams& p, cudaStream_t stream) {
  LaunchShape shape{p.blocks * Tiling::kBlocks, Tiling::kThreads, Tiling::kBytes, Tiling::kBlocks};
  shape.is_cooperative = p.is_deterministic;  // blocks wait for their turns
  return launch_backward_kernel(block_attn_backward_wide_sm90<T, Tiling, false>,
                                block_attn_backward_wide_sm90<T, Tiling, true>, shape, p, Tiling::kConsumerKeys,
                                Tiling::kConsumerKeys, stream);
}

}  // namespace
}  // namespace device::sm90

const char* backward_wide_sm90(const BackwardParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    using namespace device::sm90;
    return p.head_dim <= 256 ? launch_wide_backward<T, WideBackwardTiling<256>>(p, stream)
                             : launch_wide_backward<T, WideBackwardTiling<512>>(p, stream);
  });
}

}  // namespace dflash
