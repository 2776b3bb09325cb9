// How the Hopper backward brings the float32 sums of dQ of a section into rows and rounds them.
#pragma once

#include "attn/sm90/backward_tiling.h"

namespace dflash::DFLASH_ISA::sm90 {

// Each lane of four has two columns of four fragments of 8 columns. Returns all columns of the lane's own fragment.
DFLASH_INLINE uint4 gather_fragment(uint32_t (&x)[4]) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) {
    const bool is_upper = (threadIdx.x & mask) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & mask) continue;
      const uint32_t got = __shfl_xor_sync(~0u, is_upper ? x[i] : x[i + mask], mask);
      (is_upper ? x[i] : x[i + mask]) = got;
    }
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}

// Rounds a tile of rows. `index` counts the tiles of all head groups. One warpgroup calls this.
template <class T, class Tiling>
DFLASH_INLINE void round_grad_q(const BackwardParams& p, const BackwardLaunch& launch, int index) {
  constexpr int kRows = Tiling::kRows, kDim = Tiling::kDim, kColumns = Tiling::kGradQColumns;
  constexpr int kPieces = kRows * kDim / (64 * kColumns), kFragments = kColumns / 8;
  static_assert(kFragments % 4 == 0);
  const int row_tiles = static_cast<int>(p.row_tiles), tile = index % row_tiles;
  const int group = index / row_tiles % launch.groups, batch = index / row_tiles / launch.groups;
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const RowTile& seen = p.tiles[(p.entries == 1 ? 0 : batch) * row_tiles + tile];
  float4 sums[kPieces][kFragments] = {};
  if (seen.lo[0] < seen.hi[0] || seen.lo[1] < seen.hi[1]) {  // otherwise nobody has written sums
    const auto* const from = reinterpret_cast<const float4*>(p.grad_q_sums + int64_t(index) * (kRows * kDim)) + thread;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) sums[piece][j] = __ldcg(from + (piece * kFragments + j) * kWarpgroup);
    }
  }
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int first_row = kRows == 64 ? 0 : piece * 64, first_column = kRows == 64 ? piece * kColumns : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile * kRows + first_row + thread / 32 * 16 + lane / 4 + 8 * r;
      const int position = row >> launch.fold_bits, head = (group << launch.fold_bits) + row % (1 << launch.fold_bits);
      uint16_t* const to = static_cast<uint16_t*>(p.grad_q) + batch * p.grad_q_strides.batch +
                           head * p.grad_q_strides.head + position * p.grad_q_strides.row;
#pragma unroll
      for (int j = 0; j < kFragments; j += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4& sum = sums[piece][j + i];
          x[i] = r == 0 ? pack<T>(sum.x * scale, sum.y * scale) : pack<T>(sum.z * scale, sum.w * scale);
        }
        const uint4 fragment = gather_fragment(x);
        const int column = first_column + (j + lane % 4) * 8;
        if (position < static_cast<int>(p.q_len) && column < static_cast<int>(p.head_dim)) {
          *reinterpret_cast<uint4*>(to + column) = fragment;
        }
      }
    }
  }
}

}  // namespace dflash::DFLASH_ISA::sm90
