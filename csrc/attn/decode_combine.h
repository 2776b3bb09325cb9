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

// All threads of the block take part; a block that alone made all parts waits for nobody else. A warp takes pieces of
// rows, four columns a lane, and adds up their parts in order. It goes through the parts of all its pieces in one
// sequence, many loads ahead of the sums.
template <class T, int kDim, int kThreads>
DFLASH_INLINE void combine(const DecodeProblem& p, const Share& share, const Item& item, const RowPlace* places) {
  constexpr int kPieces = kDim <= 128 ? 1 : kDim / 128, kWarps = kThreads / 32, kAhead = 16;
  const Parts parts(p, share, item);
  const ItemRows rows(p, p.tile_plan(item.tile), item.replica);
  const int pieces = rows.positions * p.fold * kPieces, stride = parts.blocks * kWarps;
  const int head_dim = static_cast<int>(p.head_dim);
  if (parts.blocks > 1 && threadIdx.x == 0) Meeting(p, parts).wait();
  __syncthreads();

  struct Cursor {
    int piece, part = 0;

    DFLASH_INLINE void next(const Parts& parts, int stride) {
      if (++part < parts.count) return;
      part = 0;
      piece += stride;
    }
    DFLASH_INLINE int row() const { return piece / kPieces; }
    DFLASH_INLINE int column() const { return piece % kPieces * 128 + threadIdx.x % 32 * 4; }
  };
  Cursor here{static_cast<int>(blockIdx.x - parts.first_block) * kWarps + static_cast<int>(threadIdx.x) / 32};
  Cursor ahead = here;
  float maximum = -kInfinity, sum = 0;
  float4 total{0, 0, 0, 0};
#pragma unroll 1
  while (here.piece < pieces) {
    float2 stats[kAhead];
    float4 values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (ahead.piece >= pieces) break;
      const int64_t row = parts.slot(ahead.part) * kDecodeRows + ahead.row();
      stats[i] = __ldcg(p.partial_stats + row);
      values[i] = {0, 0, 0, 0};
      if (ahead.column() < head_dim) {
        values[i] = __ldcg(reinterpret_cast<const float4*>(p.partial_out + row * head_dim + ahead.column()));
      }
      ahead.next(parts, stride);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (here.piece >= pieces) break;
      // What no key was seen in changes nothing, to the bit.
      const float larger = fmaxf(maximum, stats[i].x), base = larger == -kInfinity ? 0.0f : larger;
      const float correction = exp2_of(maximum - base), weight = exp2_of(stats[i].x - base);
      maximum = larger;
      sum = fmaf(weight, stats[i].y, sum * correction);
      total.x = fmaf(weight, values[i].x, total.x * correction);
      total.y = fmaf(weight, values[i].y, total.y * correction);
      total.z = fmaf(weight, values[i].z, total.z * correction);
      total.w = fmaf(weight, values[i].w, total.w * correction);
      if (here.part + 1 == parts.count) {
        const RowPlace place = places[here.row()];
        if (here.column() < head_dim && rows.has(place)) {
          const float inverse = sum == 0 ? 0.0f : 1 / sum;
          T* const out = static_cast<T*>(p.out) + rows.offset(p.out_strides, place) + here.column();
          auto* const pairs = reinterpret_cast<uint32_t*>(out);
          pairs[0] = pack<T>(total.x * inverse, total.y * inverse);
          pairs[1] = pack<T>(total.z * inverse, total.w * inverse);
        }
        maximum = -kInfinity;
        sum = 0;
        total = {0, 0, 0, 0};
      }
      here.next(parts, stride);
    }
  }
}

}  // namespace dflash::DFLASH_ISA
