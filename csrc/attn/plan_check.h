// Finds plans that were made from other bounds than the rows have now. Bounds are tensors, which may change in place,
// also between two replays of a CUDA graph, where only a kernel can notice.
#pragma once

#include "attn/plan.h"
#include "attn/softmax.h"

namespace dflash::DFLASH_ISA {

// A plan gives a row the right result if every key that the row sees lies in the plan's runs, and if the row sees all
// of the keys that the plan says all rows see. Four lanes hold a row; each checks one of these four intervals. The plan
// is read when the object is made, so that the loads can come early.
class PlanCheck {
 public:
  DFLASH_INLINE explicit PlanCheck(const TilePlan& plan) {
    const int32_t* const lo = lane() < 2 ? plan.lo : plan.full_lo;
    const int32_t* const hi = lane() < 2 ? plan.hi : plan.full_hi;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lo_[i] = lo[i];
      hi_[i] = hi[i];
    }
  }

  // What the thread adds to its sum of the row's exponentials: 0, or a NaN, which spreads to the row's output and LSE
  // as the four lanes' sums are added up in the end.
  DFLASH_INLINE float addend(const RowBounds& row) const {
    const int row_lo[2] = {row.ctx_lo, row.blk_lo};
    const int row_hi[2] = {row.ctx_lo + static_cast<int>(row.ctx_len), row.blk_lo + static_cast<int>(row.blk_len)};
    const bool is_of_row = lane() < 2;
    // Not by an index that the compiler does not know, which would put the arrays into memory.
    const auto own = [](const int (&pair)[2]) { return lane() % 2 ? pair[1] : pair[0]; };
    const int lo = is_of_row ? own(row_lo) : own(lo_), hi = is_of_row ? own(row_hi) : own(hi_);
    // Walks through [lo, hi) as far as the other side's two intervals cover it, in whichever order they lie.
    int covered = lo;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int from = is_of_row ? lo_[i % 2] : row_lo[i % 2], to = is_of_row ? hi_[i % 2] : row_hi[i % 2];
      covered = from <= covered ? max(covered, to) : covered;
    }
    return covered >= hi ? 0.0f : __int_as_float(0x7fffffff);
  }

 private:
  static DFLASH_INLINE int lane() { return threadIdx.x % 4; }

  int lo_[2], hi_[2];
};

}  // namespace dflash::DFLASH_ISA
