// One of three walks over a tile's two runs of keys. Here each run is cut into tiles from where it begins, so that no
// tile holds keys of both. The portable forward and backward use it: the first key is all that a copy needs to know of
// a tile, and registers are scarce there. (sm90/packed_key_tiles.h lays the runs end to end; aligned_key_tiles.h cuts
// at multiples of the tile's length.)
#pragma once

#include "attn/plan.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA::sm80 {

template <int kKeys>
class KeyTilesByRun {
 public:
  DFLASH_INLINE explicit KeyTilesByRun(const TilePlan& plan)
      : lo_{plan.lo[0], plan.lo[1]},
        full_lo_{plan.full_lo[0], plan.full_lo[1]},
        full_hi_{plan.full_hi[0], plan.full_hi[1]} {
    int hi = plan.hi[0];
    first_count_ = tiles(lo_[0], hi);
    const bool has_second = plan.lo[1] < plan.hi[1];
    if (has_second && lo_[1] < lo_[0] + first_count_ * kKeys) {
      // The last tile of the first run already holds keys of the second. The runs become one, so that these keys are
      // not visited twice.
      hi = max(hi, plan.hi[1]);
      first_count_ = count_ = tiles(lo_[0], hi);
    } else {
      count_ = first_count_ + (has_second ? tiles(lo_[1], plan.hi[1]) : 0);
    }
  }

  DFLASH_INLINE int count() const { return count_; }

  // Returns the first key of tile i.
  DFLASH_INLINE int operator[](int i) const {
    return i < first_count_ ? lo_[0] + i * kKeys : lo_[1] + (i - first_count_) * kKeys;
  }

  // Returns whether every row sees every key of the tile that begins at `key`.
  DFLASH_INLINE bool is_full(int key) const {
    return (key >= full_lo_[0] && key + kKeys <= full_hi_[0]) || (key >= full_lo_[1] && key + kKeys <= full_hi_[1]);
  }

 private:
  static DFLASH_INLINE int tiles(int lo, int hi) { return (hi - lo + kKeys - 1) / kKeys; }

  int lo_[2], full_lo_[2], full_hi_[2];
  int first_count_, count_;
};

}  // namespace dflash::DFLASH_ISA::sm80
