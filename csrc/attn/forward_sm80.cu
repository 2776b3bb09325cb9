// block_attn's forward on any GPU since Ampere, with mma.sync, ldmatrix and cp.async.
//
// A block takes one item: a tile of query rows, with all the key tiles that the plan says these rows visit. Shared
// memory has one buffer for a tile of keys and one for a tile of values. Values arrive while scores are computed, and
// the next keys arrive while outputs are. Scores and probabilities stay in registers.
#include "attn/kernels.h"
#include "attn/sm80/tile_forward.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm80 {
namespace {

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    block_attn_forward_sm80(const __grid_constant__ AttentionForwardParams p,
                            const __grid_constant__ ForwardLaunch launch) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  TileForward<T, Tile>(p, launch, *reinterpret_cast<ForwardShared<Tile>*>(shared_memory)).run();
}

template <class T, int kHeadDim>
cudaError_t launch_forward(const AttentionForwardParams& p, cudaStream_t stream) {
  using Tile = ForwardTiling<kHeadDim>;
  constexpr int kSharedBytes = sizeof(ForwardShared<Tile>);
  static_assert(kSharedBytes <= kMaxPortableSharedBytes);
  const int64_t fold = fold_of(p.heads, p.kv_heads), positions = Tile::kRows / fold;
  const int64_t tiles = p.plan_entries * tiles_of(p.q_len, positions * p.plan_parts) * p.plan_parts;
  const int64_t items = tiles * (p.plan_entries == 1 ? p.batch : 1) * (p.heads / fold);
  if (items == 0) return cudaSuccess;
  const ForwardLaunch launch{__builtin_ctzll(fold),
                             static_cast<int>(positions),
                             rows_are_aligned(p.q, p.q_strides),
                             rows_are_aligned(p.k, p.k_strides),
                             rows_are_aligned(p.v, p.v_strides),
                             rows_are_aligned(p.out, p.out_strides)};
  return launch_kernel(block_attn_forward_sm80<T, Tile>, {items, Tile::kThreads, kSharedBytes}, stream, p, launch);
}

}  // namespace
}  // namespace device::sm80

const char* forward_sm80(const AttentionForwardParams& p, void* stream) {
  return launch_by_dtype_and_head_dim(p.dtype, p.head_dim, stream, [&]<class T, int kDim>(cudaStream_t stream) {
    return device::sm80::launch_forward<T, kDim>(p, stream);
  });
}

}  // namespace dflash
