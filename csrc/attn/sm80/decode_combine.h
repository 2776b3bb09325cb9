// Combines the parts of an item that several blocks share. Every block that made a part combines some of the rows, once
// all parts are there. The whole grid is resident (a cooperative launch), so that waiting for the others is safe.
#pragma once

#include <cuda/atomic>

#include "attn/sm80/decode_work.h"
#include "attn/softmax.h"
#include "common/mma.h"

namespace dflash::DFLASH_ISA::sm80 {

// The slots of an item's parts in the workspace. In exact mode every unit has a slot. Otherwise every block has two:
// one for an item that an earlier block began, and one for an item that a later block continues.
struct Parts {
  bool exact;
  int first_unit, first_block, blocks, count;

  DFLASH_INLINE Parts(const DecodeProblem& p, const WorkRange& range, const DecodeItem& item)
      : exact(p.exact), first_unit(item.first), first_block(range.block_of(item.first)) {
    blocks = range.block_of(item.first + item.count - 1) - first_block + 1;
    count = exact ? item.count : blocks;
  }

  DFLASH_INLINE int slot(int i) const { return exact ? first_unit + i : 2 * (first_block + i) + (i == 0); }
};

// How the blocks that have an item in common wait for each other. The item uses the counter of the block that it begins
// in; no other item begins there and ends in another block. The counter counts the blocks that have written their
// parts.
class Meeting {
 public:
  DFLASH_INLINE Meeting(const DecodeProblem& p, const Parts& parts)
      : counter_(p.counters[parts.first_block]), blocks_(parts.blocks) {}

  // One thread of a block calls this, after a block barrier and a release fence have published the block's parts.
  DFLASH_INLINE void arrive() { counter_.fetch_add(1, cuda::memory_order_relaxed); }

  // One thread of a block calls this, before a block barrier that precedes the block's reads.
  DFLASH_INLINE void wait() {
    while (counter_.load(cuda::memory_order_acquire) != blocks_) {
    }
  }

 private:
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device> counter_;
  uint32_t blocks_;
};

// Parts lie in memory as accumulators (common/mma.h), one fragment of 16 rows and 8 columns after another. A warp adds
// up kWidth neighbouring fragments, kBatch parts at a time.
template <class T, int kWidth, int kBatch>
DFLASH_INLINE void combine_fragments(const DecodeProblem& p, const Parts& parts, const ItemRows& rows,
                                     const RowPlace* places, int row_group, int first_fragment) {
  const int lane = threadIdx.x % 32, row = row_group * 16 + lane / 4;
  const auto load_stats = [&](int part, int r) {
    return __ldcg(p.partial_stats + parts.slot(part) * kDecodeRows + row + 8 * r);
  };
  float2 stats[kBatch][2];
  float4 values[kBatch][kWidth];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int part = min(first + i, parts.count - 1);
      stats[i][0] = load_stats(part, 0);
      stats[i][1] = load_stats(part, 1);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        const int fragment = min(first_fragment + n, p.fragments - 1);
        values[i][n] = __ldcg(p.part(parts.slot(part), row_group, fragment) + lane);
      }
    }
  };
  load(0);
  float maximum[2] = {-kInfinity, -kInfinity};
#pragma unroll 2
  for (int i = lane % 4; i < parts.count; i += 4) {
    maximum[0] = fmaxf(maximum[0], load_stats(i, 0).x);
    maximum[1] = fmaxf(maximum[1], load_stats(i, 1).x);
  }
#pragma unroll
  for (float& m : maximum) {
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    if (m == -kInfinity) m = 0;
  }

  float sum[2] = {0, 0};
  float4 totals[kWidth] = {};
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= parts.count) continue;
      const float weight[2] = {exp2_of(stats[i][0].x - maximum[0]), exp2_of(stats[i][1].x - maximum[1])};
      sum[0] = fmaf(weight[0], stats[i][0].y, sum[0]);
      sum[1] = fmaf(weight[1], stats[i][1].y, sum[1]);
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        totals[n].x = fmaf(weight[0], values[i][n].x, totals[n].x);
        totals[n].y = fmaf(weight[0], values[i][n].y, totals[n].y);
        totals[n].z = fmaf(weight[1], values[i][n].z, totals[n].z);
        totals[n].w = fmaf(weight[1], values[i][n].w, totals[n].w);
      }
    }
    first += kBatch;
    if (first >= parts.count) break;
    load(first);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowPlace place = places[row + 8 * r];
    if (!rows.has(place)) continue;
    const float inverse = inverse_of(sum[r]);
    T* const out = static_cast<T*>(p.out) + rows.offset(p.out_strides, place) + first_fragment * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kWidth; ++n) {
      const float low = r == 0 ? totals[n].x : totals[n].z, high = r == 0 ? totals[n].y : totals[n].w;
      if (first_fragment + n < p.fragments) {
        *reinterpret_cast<uint32_t*>(out + n * 8) = pack<T>(low * inverse, high * inverse);
      }
    }
  }
}

// All threads of the block call this. A block that made all parts alone waits for no other.
template <class T, int kThreads>
DFLASH_INLINE void combine(const DecodeProblem& p, const WorkRange& range, const DecodeItem& item,
                           const RowPlace* places) {
  const Parts parts(p, range, item);
  const ItemRows rows(p, p.tile_plan(item.tile), item.replica);
  if (parts.blocks > 1 && threadIdx.x == 0) Meeting(p, parts).wait();
  __syncthreads();
  const int warps = parts.blocks * (kThreads / 32), row_groups = (rows.positions * p.fold + 15) / 16;
  const auto share_out = [&]<int kWidth, int kBatch> {
    const int across = (p.fragments + kWidth - 1) / kWidth;
    int i = (blockIdx.x - parts.first_block) * (kThreads / 32) + threadIdx.x / 32;
    for (; i < row_groups * across; i += warps) {
      combine_fragments<T, kWidth, kBatch>(p, parts, rows, places, i / across, i % across * kWidth);
    }
  };
  // Each lane keeps eight loads in flight: of eight parts if there are enough warps, otherwise of two parts and four
  // fragments.
  if (row_groups * p.fragments <= warps) {
    share_out.template operator()<1, 8>();
  } else {
    share_out.template operator()<4, 2>();
  }
}

}  // namespace dflash::DFLASH_ISA::sm80
