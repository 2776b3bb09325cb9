// The last launch of the Hopper backward above head_dim 128: it rounds the float32 sums of dQ, and those of dK and dV
// of split tiles.
#include "attn/kernels.h"
#include "attn/sm90/backward_wide_tiling.h"
#include "common/dependent_launch.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm90 {
namespace {

constexpr int kThreads = 2 * kWarpgroup;
constexpr int kWidth = 256;  // columns that a block takes

// Writes 64 rows of kWidth columns, which both warpgroups hold as fragments, through shared memory as whole rows.
// at(row) is where the columns of a row begin, or null if there is no such row; `columns` of them exist.
template <class T, class At>
DFLASH_INLINE void write_tile(const float4 (&sums)[kWidth / 16], float factor, int columns, uint16_t* tile,
                              const At& at) {
  constexpr int kPitch = kWidth + 8;
  const int half = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int row = thread / 32 * 16 + thread % 32 / 4, column = half * kWidth / 2 + thread % 4 * 2;
#pragma unroll
  for (int j = 0; j < kWidth / 16; ++j) {
    uint16_t* const to = tile + row * kPitch + column + 8 * j;
    *reinterpret_cast<uint32_t*>(to) = pack<T>(sums[j].x * factor, sums[j].y * factor);
    *reinterpret_cast<uint32_t*>(to + 8 * kPitch) = pack<T>(sums[j].z * factor, sums[j].w * factor);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * kWidth / 8; i += kThreads) {
    const int row = i / (kWidth / 8), column = i % (kWidth / 8) * 8;
    uint16_t* const to = at(row);
    if (to != nullptr && column < columns) {
      *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(tile + row * kPitch + column);
    }
  }
  __syncthreads();
}

template <class T, class Tiling>
__global__ void __launch_bounds__(kThreads)
    block_attn_backward_finish_sm90(const __grid_constant__ BackwardParams p, const int64_t row_blocks) {
  constexpr int kChunks = Tiling::kDim / kWidth;
  __shared__ __align__(16) uint16_t shared[64 * (kWidth + 8)];
  const float scale = static_cast<float>(p.scale);
  wait_for_previous_kernel();
  // The sums that were written last may still be in the L2 cache, so they come first.
  const int64_t chunk = gridDim.x - 1 - blockIdx.x, block = chunk / kChunks;
  const int first_column = static_cast<int>(chunk % kChunks) * kWidth;
  const int columns = static_cast<int>(p.head_dim) - first_column;
  // 64 rows were written as fragments of 8 columns, in order. Each warpgroup takes half of the block's columns.
  const int half = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const int first_fragment = first_column / 8 + half * (kWidth / 16);
  float4 sums[kWidth / 16];
  const auto read = [&](const float* tile) {
    const auto* const from = reinterpret_cast<const float4*>(tile) + first_fragment * kWarpgroup + thread;
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j) sums[j] = from[j * kWarpgroup];
  };
  if (block < row_blocks) {
    static_assert(Tiling::kRows == 64);
    const int64_t tile = block % p.row_tiles, group = block / p.row_tiles % (p.heads / p.fold);
    const int64_t batch = block / p.row_tiles / (p.heads / p.fold);
    read(p.grad_q_sums + block * (64 * Tiling::kDim));
    write_tile<T>(sums, scale, columns, shared, [&](int row) -> uint16_t* {
      const int64_t folded = tile * 64 + row, position = folded / p.fold;
      const int64_t head = group * p.fold + folded % p.fold;
      if (position >= p.q_len) return nullptr;
      return static_cast<uint16_t*>(p.grad_q) + batch * p.grad_q_strides.batch + head * p.grad_q_strides.head +
             position * p.grad_q_strides.row + first_column;
    });
    return;
  }
  const int64_t tile = block - row_blocks, head = tile / p.key_tiles, first = tile % p.key_tiles * Tiling::kKeys;
  if (!p.is_split[tile]) return;
  constexpr int kParts = Tiling::kKeys / Tiling::kConsumerKeys;
  for (int part = 0; part < 2 * kParts; ++part) {
    const bool of_keys = part < kParts;
    void* const grad = of_keys ? p.grad_k : p.grad_v;
    const HeadStrides& strides = of_keys ? p.grad_k_strides : p.grad_v_strides;
    read(p.grad_key_sums + (tile * 2 * kParts + part) * (Tiling::kConsumerKeys * Tiling::kDim));
    write_tile<T>(sums, of_keys ? scale : 1, columns, shared, [&](int row) -> uint16_t* {
      const int64_t key = first + part % kParts * Tiling::kConsumerKeys + row;
      if (key >= p.kv_len) return nullptr;
      return static_cast<uint16_t*>(grad) + head / p.kv_heads * strides.batch + head % p.kv_heads * strides.head +
             key * strides.row + first_column;
    });
  }
}

template <class T, class Tiling>
cudaError_t launch_finish(const BackwardParams& p, cudaStream_t stream) {
  const int64_t row_blocks = p.batch * (p.heads / p.fold) * p.row_tiles;
  const int64_t key_blocks = p.batch * p.kv_heads * p.key_tiles;
  LaunchShape shape{(row_blocks + key_blocks) * (Tiling::kDim / kWidth), kThreads};
  shape.overlaps_previous = true;
  return launch_kernel(block_attn_backward_finish_sm90<T, Tiling>, shape, stream, p, row_blocks);
}

}  // namespace
}  // namespace device::sm90

const char* backward_finish_sm90(const BackwardParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    using namespace device::sm90;
    return p.head_dim <= 256 ? launch_finish<T, WideBackwardTiling<256>>(p, stream)
                             : launch_finish<T, WideBackwardTiling<512>>(p, stream);
  });
}

}  // namespace dflash
