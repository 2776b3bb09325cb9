// Which keys a row sees, and how scores that a row does not see are hidden, on a GPU.
#pragma once

#include "attn/params.h"
#include "common/mma.h"

namespace dflash::DFLASH_ISA {

// Returns ctx_lo, ctx_hi, blk_lo and blk_hi of a row.
DFLASH_INLINE int4 read_bounds(const Intervals& mask, int64_t batch, int64_t row) {
  const int64_t at = batch * mask.batch + row;
  return make_int4(mask.ctx_lo[at], mask.ctx_hi[at], mask.blk_lo[at], mask.blk_hi[at]);
}

// Whether a row sees a key. Row is RowBounds, or RowKeys of the backward.
template <class Row>
DFLASH_INLINE bool row_sees(const Row& row, int key) {
  return static_cast<unsigned>(key - row.ctx_lo) < row.ctx_len || static_cast<unsigned>(key - row.blk_lo) < row.blk_len;
}

// The keys that one row sees: two intervals, each a begin and a length.
struct RowBounds {
  int ctx_lo = 0, blk_lo = 0;
  unsigned ctx_len = 0, blk_len = 0;

  RowBounds() = default;
  DFLASH_INLINE RowBounds(int4 bounds, int kv_len) : ctx_lo(max(bounds.x, 0)), blk_lo(max(bounds.z, 0)) {
    // Both ends are clamped before the difference is taken, which therefore never overflows.
    ctx_len = max(min(bounds.y, kv_len), ctx_lo) - ctx_lo;
    blk_len = max(min(bounds.w, kv_len), blk_lo) - blk_lo;
  }
  DFLASH_INLINE RowBounds(const Intervals& mask, int64_t batch, int64_t row, int kv_len)
      : RowBounds(read_bounds(mask, batch, row), kv_len) {}

  DFLASH_INLINE bool sees(int key) const { return row_sees(*this, key); }
};

// Hides the scores that the thread's two rows do not see. s is an accumulator whose rows are queries and whose columns
// are consecutive keys from `first` on.
template <int kCount>
DFLASH_INLINE void hide(float (&s)[kCount], const RowBounds (&rows)[2], int first) {
  first += threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!rows[accumulator_row(i)].sees(first + accumulator_column(i))) s[i] = -kInfinity;
  }
}

}  // namespace dflash::DFLASH_ISA
