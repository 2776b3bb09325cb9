// The key tiles that one tile of rows visits: the runs of its plan, cut into tiles of kKeys from where each run begins.
#pragma once

#include "attn/plan.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA {

template <int kKeys>
class KeyTiles {
 public:
  DFLASH_INLINE explicit KeyTiles(const TilePlan& plan)
      : lo_{plan.lo[0], plan.lo[1]},
        full_lo_{plan.full_lo[0], plan.full_lo[1]},
        full_hi_{plan.full_hi[0], plan.full_hi[1]} {
    int hi = plan.hi[0];
    first_count_ = tiles(lo_[0], hi);
    const bool has_second = plan.lo[1] < plan.hi[1];
    if (has_second && lo_[1] < lo_[0] + first_count_ * kKeys) {
      // The first run's last tile holds keys of the second: they must not count twice.
      hi = max(hi, plan.hi[1]);
      first_count_ = count_ = tiles(lo_[0], hi);
    } else {
      count_ = first_count_ + (has_second ? tiles(lo_[1], plan.hi[1]) : 0);
    }
  }

  DFLASH_INLINE int count() const { return count_; }

  // The first key of tile i.
  DFLASH_INLINE int operator[](int i) const {
    return i < first_count_ ? lo_[0] + i * kKeys : lo_[1] + (i - first_count_) * kKeys;
  }

  // Whether every row sees every key of the tile that begins at `key`.
  DFLASH_INLINE bool is_full(int key) const {
    return (key >= full_lo_[0] && key + kKeys <= full_hi_[0]) || (key >= full_lo_[1] && key + kKeys <= full_hi_[1]);
  }

 private:
  static DFLASH_INLINE int tiles(int lo, int hi) { return (hi - lo + kKeys - 1) / kKeys; }

  int lo_[2], full_lo_[2], full_hi_[2];
  int first_count_, count_;
};

}  // namespace dflash::DFLASH_ISA
