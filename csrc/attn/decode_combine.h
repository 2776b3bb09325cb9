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

  DFLASH_INLINE void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) counter_.fetch_add(1, cuda::memory_order_release);
  }

  DFLASH_INLINE void wait() {
    if (threadIdx.x == 0) {
      while ((counter_.load(cuda::memory_order_acquire) & 0xffff) != blocks_) {
      }
      const uint32_t seen = counter_.fetch_add(1 << 16, cuda::memory_order_relaxed) >> 16;
      if (seen + 1 == blocks_) counter_.store(0, cuda::memory_order_relaxed);
    }
    __syncthreads();
  }

 private:
  cuda::atomic_ref<uint32_t, cuda::thread_scope_device> counter_;
  uint32_t blocks_;
};

// A warp sums columns 2 * lane and 2 * lane + 1 of a row's parts, in their order.
template <class T>
DFLASH_INLINE void combine_row(const DecodeProblem& p, const Parts& parts, int row, int column, T* out) {
  const int lane = threadIdx.x % 32, head_dim = static_cast<int>(p.head_dim);
  const auto stats = [&](int i) { return __ldcg(p.partial_stats + parts.slot(i) * kDecodeRows + row); };
  float maximum = -kInfinity;
  for (int i = lane; i < parts.count; i += 32) maximum = fmaxf(maximum, stats(i).x);
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, mask));
  if (maximum == -kInfinity) maximum = 0;

  float sum = 0;
  float2 total{0, 0};
  for (int first = 0; first < parts.count; first += 32) {
    float own_weight = 0, own_sum = 0;
    if (first + lane < parts.count) {
      const float2 own = stats(first + lane);
      own_weight = exp2_of(own.x - maximum);
      own_sum = own.y;
    }
    const int count = min(parts.count - first, 32);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      float2 value{0, 0};
      if (column < head_dim) {
        value = __ldcg(reinterpret_cast<const float2*>(
            p.partial_out + (parts.slot(first + i) * kDecodeRows + row) * head_dim + column));
      }
      const float weight = __shfl_sync(~0u, own_weight, i);
      sum = fmaf(weight, __shfl_sync(~0u, own_sum, i), sum);
      total.x = fmaf(weight, value.x, total.x);
      total.y = fmaf(weight, value.y, total.y);
    }
  }
  const float inverse = sum == 0 ? 0.0f : 1 / sum;
  if (column < head_dim) *reinterpret_cast<uint32_t*>(out + column) = pack<T>(total.x * inverse, total.y * inverse);
}

// All threads of the block take part; a block that alone made all parts waits for nobody else.
template <class T, int kThreads>
DFLASH_INLINE void combine(const DecodeProblem& p, const Share& share, const Item& item) {
  const Parts parts(p, share, item);
  if (parts.blocks > 1) {
    Meeting(p, parts).wait();
  } else {
    __syncthreads();
  }
  constexpr int kColumns = 64, kWarps = kThreads / 32;
  const ItemRows rows(p, p.tile_plan(item.tile), item.replica);
  const int pieces = (static_cast<int>(p.head_dim) + kColumns - 1) / kColumns;
  const int warp = (blockIdx.x - parts.first_block) * kWarps + threadIdx.x / 32;
  for (int i = warp; i < rows.count() * pieces; i += parts.blocks * kWarps) {
    const int row = i / pieces, column = i % pieces * kColumns + threadIdx.x % 32 * 2;
    if (rows.has(row)) combine_row(p, parts, row, column, static_cast<T*>(p.out) + rows.offset(p.out_strides, row));
  }
}

}  // namespace dflash::DFLASH_ISA
