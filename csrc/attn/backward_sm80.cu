// block_attn's backward on any GPU since Ampere, with mma.sync, ldmatrix and cp.async.
//
// Deterministic calls make two passes of one form, so that every sum has one owner and a fixed order. In the first a
// block holds keys and values still while the rows that see them move past, and sums dK and dV. In the second it holds
// queries and the outputs' gradients still while keys and values move past, and sums dQ (sm80/backward_pass.h). Either
// way a warp computes scores of 16 still rows with all that moves; rounded, they are the first operand of the products
// that follow.
//
// Other calls up to head_dim 128 make the first pass only. In it the blocks also add dQ to float32 sums in global
// memory, which a last launch rounds.
#include "attn/kernels.h"
#include "attn/sm80/backward_pass.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm80 {
namespace {

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_attn_backward_sm80(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardLaunch launch) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  BackwardPass<T, Tile>(p, launch, *reinterpret_cast<BackwardShared<Tile>*>(shared_memory)).run();
}

template <class T, class Tile>
cudaError_t run_pass(const BackwardParams& p, const BackwardLaunch& launch, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(BackwardShared<Tile>);
  static_assert(kSharedBytes <= kMaxPortableSharedBytes);
  const int64_t length = Tile::kOfKeys ? p.kv_len : p.q_len * p.fold;
  const int64_t heads = Tile::kOfKeys ? p.kv_heads : p.heads / p.fold;
  const int64_t blocks = (length + Tile::kStill - 1) / Tile::kStill * heads * p.batch;
  if (blocks == 0) return cudaSuccess;
  return launch_kernel(block_attn_backward_sm80<T, Tile>, {blocks, Tile::kThreads, kSharedBytes}, stream, p, launch);
}

// Rounds the sums of dQ of a tile of rows of one head group, which a block takes.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    block_attn_backward_finish_sm80(const __grid_constant__ BackwardParams p, const bool aligned) {
  constexpr int kColumnWarps = Tile::kHeadDim / Tile::kGradQColumns;
  __shared__ __align__(128) uint8_t rows[Tile::kTileRows * Tile::kRowBytes];
  const int64_t groups = p.heads / p.fold, tile = blockIdx.x % p.row_tiles;
  const int64_t group = blockIdx.x / p.row_tiles % groups, batch = blockIdx.x / p.row_tiles / groups;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const sums = p.grad_q_sums + int64_t(blockIdx.x) * Tile::kTileRows * Tile::kHeadDim;
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int j = 0; j < Tile::kGradQColumns / 8; ++j) {
    const float4 x = *reinterpret_cast<const float4*>(sums + grad_q_place<Tile>(warp, j, lane));
    const int row = warp / kColumnWarps * 16 + lane / 4, chunk = warp % kColumnWarps * (Tile::kGradQColumns / 8) + j;
    const auto at = [&](int row) {
      return reinterpret_cast<uint32_t*>(rows + chunk_offset<Tile>(row, chunk) + lane % 4 * 4);
    };
    *at(row) = pack<T>(x.x * scale, x.y * scale);
    *at(row + 8) = pack<T>(x.z * scale, x.w * scale);
  }
  __syncthreads();
  const CopyShare<Tile> share;
  const auto position = [&](int row) { return (tile * Tile::kTileRows + row) / p.fold; };
  write_rows<Tile, Tile::kTileRows>(
      rows, aligned,
      [&](int row) {
        return static_cast<uint16_t*>(p.grad_q) + batch * p.grad_q_strides.batch +
               (group * p.fold + row % p.fold) * p.grad_q_strides.head + position(row) * p.grad_q_strides.row +
               share.chunk * kChunkSize;
      },
      [&](int row) { return position(row) < p.q_len && share.chunk * kChunkSize < p.head_dim; });
}

template <class T, class Tile>
cudaError_t finish_grad_q(const BackwardParams& p, const BackwardLaunch& launch, cudaStream_t stream) {
  const int64_t tiles = p.batch * (p.heads / p.fold) * p.row_tiles;
  if (tiles == 0) return cudaSuccess;
  return launch_kernel(block_attn_backward_finish_sm80<T, Tile>, {tiles, Tile::kThreads}, stream, p,
                       launch.grad_q_aligned);
}

template <class T, int kDim>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
  const BackwardLaunch launch{__builtin_ctzll(p.fold),
                              static_cast<int>(p.heads / p.fold),
                              static_cast<int>(p.heads / p.kv_heads / p.fold),
                              rows_are_aligned(p.q, p.q_strides),
                              rows_are_aligned(p.k, p.k_strides),
                              rows_are_aligned(p.v, p.v_strides),
                              rows_are_aligned(p.grad_out, p.grad_out_strides),
                              rows_are_aligned(p.grad_q, p.grad_q_strides),
                              rows_are_aligned(p.grad_k, p.grad_k_strides),
                              rows_are_aligned(p.grad_v, p.grad_v_strides)};
  if constexpr (kDim <= 128) {
    if (p.grad_q_sums != nullptr) {
      using Tile = BackwardTiling<kDim, BackwardOf::kAll>;
      const cudaError_t status = run_pass<T, Tile>(p, launch, stream);
      return status == cudaSuccess ? finish_grad_q<T, Tile>(p, launch, stream) : status;
    }
  }
  const cudaError_t status = run_pass<T, BackwardTiling<kDim, BackwardOf::kKeys>>(p, launch, stream);
  return status == cudaSuccess ? run_pass<T, BackwardTiling<kDim, BackwardOf::kQueries>>(p, launch, stream) : status;
}

}  // namespace
}  // namespace device::sm80

const char* backward_sm80(const BackwardParams& p, void* stream) {
  return launch_by_dtype_and_head_dim(p.dtype, p.head_dim, stream, [&]<class T, int kDim>(cudaStream_t stream) {
    return device::sm80::launch_backward<T, kDim>(p, stream);
  });
}

}  // namespace dflash
