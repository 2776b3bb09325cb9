// block_attn's backward on any GPU since Ampere, with mma.sync, ldmatrix and cp.async.
//
// Two passes of one form, so that every sum has one owner and a fixed order. In the first a block holds keys and values
// still while the rows that see them move past, and sums dK and dV. In the second it holds queries and the outputs'
// gradients still while keys and values move past, and sums dQ (sm80/backward_pass.h). Either way a warp computes
// scores of 16 still rows with all that moves; rounded, they are the first operand of the products that follow.
#include "attn/kernels.h"
#include "attn/sm80/backward_pass.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm80 {
namespace {

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_attn_backward_keys_sm80(const __grid_constant__ BackwardParams p,
                                  const __grid_constant__ BackwardLaunch launch) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  BackwardPass<T, Tile>(p, launch, *reinterpret_cast<BackwardShared<Tile>*>(shared_memory)).run();
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_attn_backward_queries_sm80(const __grid_constant__ BackwardParams p,
                                     const __grid_constant__ BackwardLaunch launch) {
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
  const auto kernel = [] {
    if constexpr (Tile::kOfKeys) {
      return block_attn_backward_keys_sm80<T, Tile>;
    } else {
      return block_attn_backward_queries_sm80<T, Tile>;
    }
  }();
  return launch_kernel(kernel, {blocks, Tile::kThreads, kSharedBytes}, stream, p, launch);
}

template <class T, int kDim>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
  const BackwardLaunch launch{__builtin_ctzll(p.fold),
                      rows_are_aligned(p.q, p.q_strides),
                      rows_are_aligned(p.k, p.k_strides),
                      rows_are_aligned(p.v, p.v_strides),
                      rows_are_aligned(p.grad_out, p.grad_out_strides),
                      rows_are_aligned(p.grad_q, p.grad_q_strides),
                      rows_are_aligned(p.grad_k, p.grad_k_strides),
                      rows_are_aligned(p.grad_v, p.grad_v_strides)};
  const cudaError_t status = run_pass<T, BackwardTiling<kDim, true>>(p, launch, stream);
  return status == cudaSuccess ? run_pass<T, BackwardTiling<kDim, false>>(p, launch, stream) : status;
}

}  // namespace
}  // namespace device::sm80

const char* backward_sm80(const BackwardParams& p, void* stream) {
  return launch_by_dtype_and_head_dim(p.dtype, p.head_dim, stream, [&]<class T, int kDim>(cudaStream_t stream) {
    return device::sm80::launch_backward<T, kDim>(p, stream);
  });
}

}  // namespace dflash
