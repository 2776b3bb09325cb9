// What the rows of a tile see, over all rows: made by some lanes of a warp together, for plans and for the tables of
// the backward.
#pragma once

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include "common/device.h"

namespace dflash::DFLASH_ISA::sm80 {

namespace cg = cooperative_groups;

constexpr int kFar = 1 << 30;

// Reduces over a whole warp by its own instruction. Parts of a warp would execute that one part after another, so they
// use shuffles.
template <class Lanes, class Op>
DFLASH_INLINE int reduced(const Lanes& lanes, int value, Op op) {
  if constexpr (Lanes::num_threads() == 32) {
    return cg::reduce(lanes, value, op);
  } else {
#pragma unroll
    for (int distance = Lanes::num_threads() / 2; distance > 0; distance /= 2) {
      value = op(value, lanes.shfl_xor(value, distance));
    }
    return value;
  }
}

// Intervals of one kind, one a row: [lo, hi) holds all of them, and every one of them holds [full_lo, full_hi).
struct Hull {
  int lo = kFar, hi = 0, full_lo = 0, full_hi = kFar;

  DFLASH_INLINE void add(int row_lo, int row_hi) {
    const bool sees = row_lo < row_hi;
    lo = min(lo, sees ? row_lo : kFar);
    hi = max(hi, sees ? row_hi : 0);
    full_lo = max(full_lo, sees ? row_lo : 0);
    full_hi = min(full_hi, sees ? row_hi : 0);
  }

  // Merges the lanes' hulls. Empty intervals become [0, 0).
  template <class Lanes>
  DFLASH_INLINE void merge(const Lanes& lanes) {
    lo = reduced(lanes, lo, cg::less<int>());
    hi = reduced(lanes, hi, cg::greater<int>());
    full_lo = reduced(lanes, full_lo, cg::greater<int>());
    full_hi = reduced(lanes, full_hi, cg::less<int>());
    if (lo >= hi) lo = hi = 0;
    if (full_lo >= full_hi) full_lo = full_hi = 0;
  }
};

// The hulls of both kinds of interval.
struct Hulls {
  Hull ctx, blk;

  // Adds a row whose bounds lie within the keys. Intervals that touch become one, so that tiles across the seam can be
  // full as well.
  DFLASH_INLINE void add(int ctx_lo, int ctx_hi, int blk_lo, int blk_hi) {
    if (ctx_lo < ctx_hi && blk_lo < blk_hi && ctx_lo <= blk_hi && blk_lo <= ctx_hi) {
      ctx_lo = min(ctx_lo, blk_lo);
      ctx_hi = max(ctx_hi, blk_hi);
      blk_lo = blk_hi = 0;
    }
    ctx.add(ctx_lo, ctx_hi);
    blk.add(blk_lo, blk_hi);
  }

  template <class Lanes>
  DFLASH_INLINE void merge(const Lanes& lanes) {
    ctx.merge(lanes);
    blk.merge(lanes);
  }
};

}  // namespace dflash::DFLASH_ISA::sm80
