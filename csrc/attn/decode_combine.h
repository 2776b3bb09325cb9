// Brings the parts of an item together. Every block that made some of them takes rows of the result, once all are
// there; the grid is resident as a whole, so waiting for the others is safe.
#pragma once

#include <cuda/atomic>

#include "attn/decode_work.h"
#include "attn/softmax.h"
#include "common/mma.h"

namespace dflash::DFLASH_ISA {

// The slots of an item's parts. In exact mode every unit has its own. Otherwise a block has two: for what it finds
// begun, and for what it leaves unfinished.
struct Parts {
  bool exact;
  int first_unit, first_block, blocks, count;

  DFLASH_INLINE Parts(const DecodeProblem& p, const Share& share, const Item& item)
      : exact(p.exact), first_unit(item.first), first_block(share.block_of(item.first)) {
    blocks = share.block_of(item.first + item.count - 1) - first_block + 1;
    count = exact ? item.count : blocks;
  }

  DFLASH_INLINE int64_t slot(int i) const {
    return exact ? int64_t(first_unit) + i : 2 * int64_t(first_block + i) + (i == 0);
  }
};

// One counter serves an item that several blocks share, that of the block it begins in: the lower half counts who has
// written its parts, the upper half who has seen that all have. The last to see it leaves a zero.
class Meeting {
 public:
  DFLASH_INLINE Meeting(const DecodeProblem& p, const Parts& parts)
      : counter_(reinterpret_cast<uint32_t&>(p.counters[parts.first_block])), blocks_(parts.blocks) {}

  // One thread of a block, after a barrier that follows what the block has written.
  DFLASH_INLINE void arrive() { counter_.fetch_add(1, cuda::memory_order_release); }

  // One thread of a block, before a barrier that precedes what the block reads.
  DFLASH_INLINE void wait() {
    while ((counter_.load(cuda::memory_order_acquire) & 0xffff) != blocks_) {
    }
    const uint32_t seen = counter_.fetch_add(1 << 16, cuda::memory_order_relaxed) >> 16;
    if (seen + 1 == blocks_) counter_.store(0, cuda::memory_order_relaxed);
  }

 private:
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device> counter_;
  uint32_t blocks_;
};

// The sum of one row's parts, in their order: half a warp takes 128 columns, eight a lane. `piece` says which 128.
template <class T, int kDim>
DFLASH_INLINE void combine_row(const DecodeProblem& p, const Parts& parts, int row, int piece, T* out) {
  constexpr int kBatch = 8;  // parts whose loads are under way together
  constexpr int kQuads = kDim <= 64 ? 1 : 2;
  const int lane = threadIdx.x % 16, head_dim = static_cast<int>(p.head_dim);
  const int columns[2] = {piece * 128 + lane * 4, piece * 128 + 64 + lane * 4};
  float2 stats[kBatch];
  float4 values[kBatch][kQuads];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = parts.slot(min(first + i, parts.count - 1)) * kDecodeRows + row;
      stats[i] = first + i < parts.count ? __ldcg(p.partial_stats + at) : float2{-kInfinity, 0};
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        values[i][j] = {0, 0, 0, 0};
        if (first + i < parts.count && columns[j] < head_dim) {
          values[i][j] = __ldcg(reinterpret_cast<const float4*>(p.partial_out + at * head_dim + columns[j]));
        }
      }
    }
  };
  load(0);
  float maximum = -kInfinity;
#pragma unroll 1
  for (int i = lane; i < parts.count; i += 16) {
    maximum = fmaxf(maximum, __ldcg(p.partial_stats + parts.slot(i) * kDecodeRows + row).x);
  }
#pragma unroll
  for (int mask = 8; mask > 0; mask >>= 1) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, mask));
  if (maximum == -kInfinity) maximum = 0;

  float sum = 0;
  float4 totals[kQuads] = {};
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = exp2_of(stats[i].x - maximum);
      sum = fmaf(weight, stats[i].y, sum);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        totals[j].x = fmaf(weight, values[i][j].x, totals[j].x);
        totals[j].y = fmaf(weight, values[i][j].y, totals[j].y);
        totals[j].z = fmaf(weight, values[i][j].z, totals[j].z);
        totals[j].w = fmaf(weight, values[i][j].w, totals[j].w);
      }
    }
    first += kBatch;
    if (first >= parts.count) break;
    load(first);
  }
  const float inverse = sum == 0 ? 0.0f : 1 / sum;
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    if (!out || columns[j] >= head_dim) continue;
    auto* const pairs = reinterpret_cast<uint32_t*>(out + columns[j]);
    pairs[0] = pack<T>(totals[j].x * inverse, totals[j].y * inverse);
    pairs[1] = pack<T>(totals[j].z * inverse, totals[j].w * inverse);
  }
}

// All threads of the block take part; a block that alone made all parts waits for nobody else.
template <class T, int kDim, int kThreads>
DFLASH_INLINE void combine(const DecodeProblem& p, const Share& share, const Item& item, const RowPlace* places) {
  constexpr int kPieces = (kDim + 127) / 128, kHalves = kThreads / 16;
  const Parts parts(p, share, item);
  const ItemRows rows(p, p.tile_plan(item.tile), item.replica);
  if (parts.blocks > 1 && threadIdx.x == 0) Meeting(p, parts).wait();
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x) / 16, last = rows.positions * p.fold * kPieces - 1;
  // Both halves of a warp take every turn, for they exchange values; what comes after the last piece is written nowhere.
  for (int i = (blockIdx.x - parts.first_block) * kHalves; i + own / 2 * 2 <= last; i += parts.blocks * kHalves) {
    const int index = min(i + own, last), row = index / kPieces;
    const RowPlace place = places[row];
    T* out = nullptr;
    if (i + own <= last && rows.has(place)) out = static_cast<T*>(p.out) + rows.offset(p.out_strides, place);
    combine_row<T, kDim>(p, parts, row, index % kPieces, out);
  }
}

}  // namespace dflash::DFLASH_ISA
