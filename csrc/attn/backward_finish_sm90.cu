// The last launch of the Hopper backward: it rounds the float32 sums of dQ, and those of dK and dV of split tiles.
#include "attn/kernels.h"
#include "attn/sm90/backward_tiling.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm90 {
namespace {

constexpr int kThreads = 2 * kWarpgroup;

// Writes 64 rows of kDim columns, which both warpgroups hold as fragments, through shared memory as whole rows. at(row)
// is where a row begins, or null if there is no such row.
template <class T, class Tiling, class At>
DFLASH_INLINE void write_tile(const float4 (&sums)[Tiling::kDim / 16], float factor, int head_dim, const At& at) {
  constexpr int kPitch = Tiling::kDim + 8;
  __shared__ __align__(16) uint16_t tile[64 * kPitch];
  const int half = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int row = thread / 32 * 16 + thread % 32 / 4, column = half * Tiling::kDim / 2 + thread % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tiling::kDim / 16; ++j) {
    uint16_t* const to = tile + row * kPitch + column + 8 * j;
    *reinterpret_cast<uint32_t*>(to) = pack<T>(sums[j].x * factor, sums[j].y * factor);
    *reinterpret_cast<uint32_t*>(to + 8 * kPitch) = pack<T>(sums[j].z * factor, sums[j].w * factor);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * Tiling::kDim / 8; i += kThreads) {
    const int row = i / (Tiling::kDim / 8), column = i % (Tiling::kDim / 8) * 8;
    uint16_t* const to = at(row);
    if (to != nullptr && column < head_dim) {
      *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(tile + row * kPitch + column);
    }
  }
  __syncthreads();
}

template <class T, class Tiling>
__global__ void __launch_bounds__(kThreads)
    block_attn_backward_finish_sm90(const __grid_constant__ BackwardParams p, const int64_t row_blocks) {
  constexpr int64_t kRowTileSums = Tiling::kRows * Tiling::kDim;
  const float scale = static_cast<float>(p.scale);
  const int head_dim = static_cast<int>(p.head_dim);
  const int half = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  float4 sums[Tiling::kDim / 16];
  if (blockIdx.x < row_blocks) {
    const int64_t tile = blockIdx.x % p.row_tiles, group = blockIdx.x / p.row_tiles % (p.heads / p.fold);
    const int64_t batch = blockIdx.x / p.row_tiles / (p.heads / p.fold);
    const auto* from = reinterpret_cast<const float4*>(p.grad_q_sums + blockIdx.x * kRowTileSums) +
                       half * (Tiling::kRows * Tiling::kDim / 8) + thread;
#pragma unroll
    for (int j = 0; j < Tiling::kDim / 16; ++j) sums[j] = from[j * kWarpgroup];
    write_tile<T, Tiling>(sums, scale, head_dim, [&](int row) -> uint16_t* {
      const int64_t folded = tile * Tiling::kRows + row, position = folded / p.fold;
      const int64_t head = group * p.fold + folded % p.fold;
      if (position >= p.q_len) return nullptr;
      return static_cast<uint16_t*>(p.grad_q) + batch * p.grad_q_strides.batch + head * p.grad_q_strides.head +
             position * p.grad_q_strides.row;
    });
    return;
  }
  const int64_t tile = blockIdx.x - row_blocks, head = tile / p.key_tiles, first = tile % p.key_tiles * Tiling::kKeys;
  if (!p.is_split[tile]) return;
  const auto* from = reinterpret_cast<const float4*>(p.grad_key_sums + tile * 2 * Tiling::kKeys * Tiling::kDim);
  for (int part = 0; part < 2 * Tiling::kConsumers; ++part) {
    const bool of_keys = part < Tiling::kConsumers;
    void* const grad = of_keys ? p.grad_k : p.grad_v;
    const HeadStrides& strides = of_keys ? p.grad_k_strides : p.grad_v_strides;
    // A consumer wrote fragments of 64 keys and all columns. Here each warpgroup takes half of the columns.
#pragma unroll
    for (int j = 0; j < Tiling::kDim / 16; ++j) {
      const int fragment = half * (Tiling::kDim / 16) + j;
      sums[j] = from[part * (Tiling::kConsumerKeys * Tiling::kDim / 4) + fragment * kWarpgroup + thread];
    }
    write_tile<T, Tiling>(sums, of_keys ? scale : 1, head_dim, [&](int row) -> uint16_t* {
      const int64_t key = first + part % Tiling::kConsumers * Tiling::kConsumerKeys + row;
      if (key >= p.kv_len) return nullptr;
      return static_cast<uint16_t*>(grad) + head / p.kv_heads * strides.batch + head % p.kv_heads * strides.head +
             key * strides.row;
    });
  }
}

template <class T, int kDim>
cudaError_t launch_finish(const BackwardParams& p, cudaStream_t stream) {
  const int64_t row_tiles = p.batch * (p.heads / p.fold) * p.row_tiles, key_tiles = p.batch * p.kv_heads * p.key_tiles;
  return launch_kernel(block_attn_backward_finish_sm90<T, BackwardTiling<kDim>>, {row_tiles + key_tiles, kThreads},
                       stream, p, row_tiles);
}

}  // namespace
}  // namespace device::sm90

const char* backward_finish_sm90(const BackwardParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    using namespace device::sm90;
    return p.head_dim <= 64 ? launch_finish<T, 64>(p, stream) : launch_finish<T, 128>(p, stream);
  });
}

}  // namespace dflash
