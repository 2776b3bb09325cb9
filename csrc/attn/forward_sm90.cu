// block_attn's forward on Hopper, with wgmma and TMA.
//
// A persistent grid works through a schedule of items (sm90/schedule.h). An item is a tile of query rows of one batch
// entry and one group of folded heads, and the keys that the plan says these rows visit (sm90/packed_key_tiles.h).
//
// Warpgroup 0 is the producer (sm90/forward_producer.h): one of its threads starts TMA loads of the tile's queries and,
// one tile after another, of keys and values into a ring of stages. The other warpgroups are the consumers
// (sm90/forward_consumer.h), with 64 rows each. With head_dim above 256 two consumers share the 64 rows of the tile,
// and each sums half of the output's columns.
//
// A consumer keeps its output and its softmax's weights in registers. In every step it starts the scores of the next
// keys, then the product of the previous keys' weights and values, and takes the softmax of the scores while that
// product runs. At head_dim 128 the consumers run in ping-pong: they take turns at starting products, so that one's
// softmax runs beside the other's products.
#include <algorithm>

#include "attn/kernels.h"
#include "attn/sm90/block_memory.h"
#include "attn/sm90/boxes.h"
#include "attn/sm90/forward_consumer.h"
#include "attn/sm90/forward_producer.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm90 {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(ForwardTiling<kDim>::kThreads, 1)
    block_attn_forward_sm90(const __grid_constant__ AttentionForwardParams p,
                            const __grid_constant__ Schedule schedule, const __grid_constant__ ForwardMaps maps) {
  using Tiling = ForwardTiling<kDim>;
  const auto [shared, memory] = begin_block<ForwardShared<Tiling>, Tiling::kBytes>();
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_dec<Tiling::kProducerRegisters>();
    if (threadIdx.x == 0) ForwardProducer<Tiling>(p, schedule, maps, shared, memory).run();
  } else {
    setmaxnreg_inc<Tiling::kConsumerRegisters>();
    ForwardConsumer<T, Tiling>(p, schedule, maps, shared, memory).run();
  }
}

template <class T, int kDim>
cudaError_t launch_forward(const AttentionForwardParams& p, cudaStream_t stream) {
  using Tiling = ForwardTiling<kDim>;
  const int64_t fold = fold_of(p.heads, p.kv_heads);
  ForwardMaps maps;
  const cudaError_t status = make_tensor_maps(p.dtype, {{&maps.q, query_box(p, p.q, p.q_strides, fold)},
                                                        {&maps.out, query_box(p, p.out, p.out_strides, fold)},
                                                        {&maps.k, key_box(p, p.k, p.k_strides, Tiling::kKeys)},
                                                        {&maps.v, key_box(p, p.v, p.v_strides, Tiling::kKeys)},
                                                        {&maps.k_granule, key_box(p, p.k, p.k_strides, kGranule)},
                                                        {&maps.v_granule, key_box(p, p.v, p.v_strides, kGranule)}});
  if (status != cudaSuccess) return status;
  const int64_t items = scheduled_items(p, Tiling::kRows);
  if (items > kMaxScheduledItems) return cudaErrorInvalidConfiguration;
  const LaunchShape shape{std::min<int64_t>(items, multiprocessors_of(stream)), Tiling::kThreads, Tiling::kBytes};
  return launch_kernel(block_attn_forward_sm90<T, kDim>, shape, stream, p, make_schedule(p, items), maps);
}

}  // namespace
}  // namespace device::sm90

bool forward_sm90_runs_here() { return hopper_kernels_serve(); }

uint32_t forward_sm90_misses(const AttentionForwardParams& p) {
  if (!hopper_kernels_serve() || p.kv_len == 0) return kNoSuchKernel;
  return copy_engine_serves(p) ? 0 : kForwardLayout;
}

const char* forward_sm90(const AttentionForwardParams& p, void* stream) {
  return launch_by_dtype_and_head_dim(p.dtype, p.head_dim, stream, [&]<class T, int kDim>(cudaStream_t stream) {
    return device::sm90::launch_forward<T, kDim>(p, stream);
  });
}

}  // namespace dflash
