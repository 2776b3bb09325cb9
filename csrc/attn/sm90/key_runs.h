// The keys that one tile of rows visits: the two runs of its plan laid end to end in granules, and cut into tiles. So a
// block's own few keys share a tile with the end of its context.
#pragma once

#include "attn/plan.h"
#include "attn/softmax.h"

namespace dflash::DFLASH_ISA {

constexpr int kGranule = 16;

// kKeys columns, a multiple of kGranule: column c is key first + c before the seam, and key first + jump + c from it
// on.
template <int kKeys>
struct KeyTile {
  int first, seam, jump;
  bool is_full;  // every row sees every key

  // Has keys of [lo, hi).
  DFLASH_INLINE bool meets(int lo, int hi) const {
    const auto meet = [&](int begin, int end) { return (begin < end) & (begin < hi) & (end > lo); };
    return meet(first, first + seam) | meet(first + jump + seam, first + jump + kKeys);
  }
};

template <int kKeys>
class KeyRuns {
 public:
  DFLASH_INLINE explicit KeyRuns(const TilePlan& plan)
      : lo_{plan.lo[0], plan.lo[1]},
        full_lo_{plan.full_lo[0], plan.full_lo[1]},
        full_hi_{plan.full_hi[0], plan.full_hi[1]} {
    int hi = plan.hi[0], second = plan.hi[1] - plan.lo[1];
    if (second > 0 && lo_[1] < lo_[0] + padded(hi - lo_[0])) {
      // The first run's last granule holds keys of the second: they must not count twice.
      hi = max(hi, plan.hi[1]);
      second = 0;
    }
    seam_ = padded(hi - lo_[0]);
    count_ = (seam_ + second + kKeys - 1) / kKeys;
    if (second <= 0) seam_ = count_ * kKeys;
  }

  DFLASH_INLINE int count() const { return count_; }

  DFLASH_INLINE KeyTile<kKeys> operator[](int i) const {
    const int begin = i * kKeys, jump = lo_[1] - seam_ - lo_[0];
    KeyTile<kKeys> tile{lo_[0] + begin, min(seam_ - begin, kKeys), jump, false};
    if (tile.seam <= 0) {
      tile.first += jump;
      tile.seam = kKeys;
    }
    tile.is_full = (tile.seam == kKeys) & (within(tile.first, 0) | within(tile.first, 1));
    return tile;
  }

 private:
  static DFLASH_INLINE int padded(int keys) { return (keys + kGranule - 1) / kGranule * kGranule; }
  DFLASH_INLINE bool within(int first, int run) const {
    return (first >= full_lo_[run]) & (first + kKeys <= full_hi_[run]);
  }

  int lo_[2], full_lo_[2], full_hi_[2];
  int seam_, count_;
};

// Hides what the thread's two rows do not see.
template <int kCount>
DFLASH_INLINE void hide(float (&s)[kCount], const RowBounds (&rows)[2], const KeyTile<2 * kCount>& tile) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int granule = 0; granule < kCount / 8; ++granule) {
    const int first = tile.first + column + granule * kGranule + (granule * kGranule < tile.seam ? 0 : tile.jump);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!rows[i / 2 % 2].sees(first + i / 4 * 8 + i % 2)) s[granule * 8 + i] = -kInfinity;
    }
  }
}

}  // namespace dflash::DFLASH_ISA
