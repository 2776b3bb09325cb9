// What the rows of a tile see, over all rows: made by some lanes of a warp together, for plans and for the tables of
// the backward.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA::sm80 {

constexpr int kFar = 1 << 30;

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

  // Merges the hull of the lane at this distance.
  DFLASH_INLINE void merge_other(int distance) {
    lo = min(lo, __shfl_xor_sync(~0u, lo, distance));
    hi = max(hi, __shfl_xor_sync(~0u, hi, distance));
    full_lo = max(full_lo, __shfl_xor_sync(~0u, full_lo, distance));
    full_hi = min(full_hi, __shfl_xor_sync(~0u, full_hi, distance));
  }

  // Merges the hulls of all lanes of the warp.
  DFLASH_INLINE void merge_warp() {
    lo = __reduce_min_sync(~0u, lo);
    hi = __reduce_max_sync(~0u, hi);
    full_lo = __reduce_max_sync(~0u, full_lo);
    full_hi = __reduce_min_sync(~0u, full_hi);
  }

  // Empty intervals become [0, 0).
  DFLASH_INLINE void close() {
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

  // Merges the hulls of `lanes` lanes that lie side by side, and gives the result to each of them. `lanes` divides 32.
  // All lanes of the warp call this.
  DFLASH_INLINE void merge(int lanes) {
    if (lanes == 32) {
      ctx.merge_warp();
      blk.merge_warp();
    } else {
      for (int distance = lanes / 2; distance > 0; distance /= 2) {
        ctx.merge_other(distance);
        blk.merge_other(distance);
      }
    }
    ctx.close();
    blk.close();
  }
};

}  // namespace dflash::DFLASH_ISA::sm80
