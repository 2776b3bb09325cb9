// The first launch of a backward. A block takes a tile of rows of one head group. It computes the rows' deltas, sets
// the tile's sums of dQ to zero if the kernel wants that, and, once for all head groups, writes what the tile's
// positions see.
#include "attn/backward.h"
#include "attn/kernels.h"
#include "attn/masking.h"
#include "attn/scores.h"
#include "attn/sm80/hulls.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm80 {
namespace {

constexpr int kThreads = 256;

// Writes what the positions of a tile see. One warp calls this.
DFLASH_INLINE void describe_tile(const BackwardParams& p, int64_t entry, int64_t tile) {
  const int lane = threadIdx.x % 32;
  const int64_t positions = p.tile_rows / p.fold, first = tile * positions, tiles = p.row_tiles;
  const int kv_len = static_cast<int>(p.kv_len);
  Hulls hulls;
  bool has_empty = false;
  for (int64_t i = lane; i < positions; i += 32) {
    const int64_t position = first + i;
    RowKeys keys{};
    if (position < p.q_len) {
      const RowBounds bounds(p.mask, entry, position, kv_len);
      keys = {bounds.ctx_lo, bounds.blk_lo, bounds.ctx_len, bounds.blk_len};
      has_empty |= keys.ctx_len == 0 && keys.blk_len == 0;
      hulls.add(keys.ctx_lo, keys.ctx_lo + static_cast<int>(keys.ctx_len), keys.blk_lo,
                keys.blk_lo + static_cast<int>(keys.blk_len));
    }
    p.keys[entry * tiles * positions + position] = keys;
  }
  hulls.merge(32);
  has_empty = __any_sync(~0u, has_empty);
  if (lane == 0) {
    RowTile described{};
    described.has_empty = has_empty;
    const Hull runs[2] = {hulls.ctx, hulls.blk};
    for (int i = 0; i < 2; ++i) {
      described.lo[i] = runs[i].lo;
      described.hi[i] = runs[i].hi;
      described.full_lo[i] = runs[i].full_lo;
      described.full_hi[i] = runs[i].full_hi;
    }
    p.tiles[entry * tiles + tile] = described;
  }
}

// kLanes threads share a row.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    block_attn_backward_prepare_sm80(const __grid_constant__ BackwardParams p, const bool aligned) {
  // Divisions of 64 bits would take longer than the loads.
  const unsigned fold_bits = __ffs(p.fold) - 1, groups = static_cast<unsigned>(p.heads) >> fold_bits;
  const unsigned tiles = p.row_tiles;
  // What comes last may still be in the L2 cache when the next kernel begins with it.
  const unsigned index = gridDim.x - 1 - blockIdx.x;
  const unsigned tile = index % tiles, group = index / tiles % groups, batch = index / tiles / groups;
  if (group == 0 && batch < p.entries && threadIdx.x < 32) describe_tile(p, batch, tile);
  if (p.adds_to_zeros) {
    auto* const sums = reinterpret_cast<float4*>(p.grad_q_sums + int64_t(index) * p.tile_rows * p.tile_dim);
    for (int i = threadIdx.x; i < p.tile_rows * p.tile_dim / 4; i += kThreads) sums[i] = make_float4(0, 0, 0, 0);
  }
  const int lane = threadIdx.x % kLanes;
  for (int row = threadIdx.x / kLanes; row < p.tile_rows; row += kThreads / kLanes) {
    const int64_t position = (tile * p.tile_rows + row) >> fold_bits;
    const int64_t head = (group << fold_bits) + row % (1u << fold_bits);
    float sum = 0, lse = kInfinity, delta = 0;
    if (position < p.q_len) {
      const auto at = [&](const void* data, const HeadStrides& strides) {
        return static_cast<const T*>(data) + batch * strides.batch + head * strides.head + position * strides.row;
      };
      const T* const out = at(p.out, p.out_strides);
      const T* const grad = at(p.grad_out, p.grad_out_strides);
      for (int d = lane * 8; d < p.head_dim; d += kLanes * 8) {
        float a[8], b[8];
        load(a, out + d, aligned);
        load(b, grad + d, aligned);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
      }
      const int64_t at_row = (batch * p.heads + head) * p.q_len + position;
      const float natural = static_cast<const float*>(p.lse)[at_row];
      if (natural != -kInfinity) {
        lse = natural * kLog2E;
        if (p.grad_lse) delta = -static_cast<const float*>(p.grad_lse)[at_row];
      }
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    // The delta of a row that sees nothing is zero, whatever its gradients hold.
    if (lse != kInfinity) delta += sum;
    if (lane == 0) {
      float* const stats = p.stats + int64_t(index) * 2 * p.tile_rows;
      stats[row] = lse;
      stats[p.tile_rows + row] = delta;
    }
  }
}

template <class T>
cudaError_t launch_prepare(const BackwardParams& p, cudaStream_t stream) {
  const bool aligned = rows_are_aligned(p.out, p.out_strides) && rows_are_aligned(p.grad_out, p.grad_out_strides);
  const int64_t blocks = p.row_tiles * (p.heads / p.fold) * p.batch;
  const auto kernel = p.head_dim <= 64    ? block_attn_backward_prepare_sm80<T, 8>
                      : p.head_dim <= 128 ? block_attn_backward_prepare_sm80<T, 16>
                                          : block_attn_backward_prepare_sm80<T, 32>;
  return launch_kernel(kernel, {blocks, kThreads}, stream, p, aligned);
}

}  // namespace
}  // namespace device::sm80

const char* backward_prepare(const BackwardParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::sm80::launch_prepare<T>(p, stream);
  });
}

}  // namespace dflash
