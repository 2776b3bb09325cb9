// One of three walks over a tile's two runs of keys. Here the runs are laid end to end in granules of 16 keys and then
// cut into tiles, so that one tile may hold the end of the first run and the begin of the second. The Hopper forward
// uses it: a DFlash block's own few keys share a tile with the end of its context. (sm80/key_tiles_by_run.h begins a
// new tile with each run; aligned_key_tiles.h cuts at multiples of the tile's length.)
#pragma once

#include "attn/masking.h"
#include "attn/plan.h"

namespace dflash::DFLASH_ISA::sm90 {

constexpr int kGranule = 16;

// A tile of kKeys columns, a multiple of kGranule. The seam is where the second run begins: column c is key first + c
// before the seam, and key first + jump + c from the seam on. A tile that lies in one run has its seam at kKeys.
template <int kKeys>
struct PackedKeyTile {
  int first, seam, jump;
  bool is_full;  // every row of the tile of rows sees every key

  DFLASH_INLINE bool has_seam() const { return seam != kKeys; }

  // The first key of the granule that begins at this column.
  DFLASH_INLINE int key(int column) const { return first + column + (column < seam ? 0 : jump); }

  // Whether the tile has keys of [lo, hi).
  DFLASH_INLINE bool meets(int lo, int hi) const {
    const auto meet = [&](int begin, int end) { return (begin < end) & (begin < hi) & (end > lo); };
    return meet(first, first + seam) | meet(first + jump + seam, first + jump + kKeys);
  }
};

template <int kKeys>
class PackedKeyTiles {
 public:
  DFLASH_INLINE explicit PackedKeyTiles(const TilePlan& plan)
      : lo_{plan.lo[0], plan.lo[1]},
        full_lo_{plan.full_lo[0], plan.full_lo[1]},
        full_hi_{plan.full_hi[0], plan.full_hi[1]} {
    int hi = plan.hi[0], second = plan.hi[1] - plan.lo[1];
    if (second > 0 && lo_[1] < lo_[0] + padded(hi - lo_[0])) {
      // The last granule of the first run already holds keys of the second. The runs become one, so that these keys are
      // not visited twice.
      hi = max(hi, plan.hi[1]);
      second = 0;
    }
    seam_ = padded(hi - lo_[0]);
    count_ = (seam_ + second + kKeys - 1) / kKeys;
    if (second <= 0) seam_ = count_ * kKeys;
  }

  DFLASH_INLINE int count() const { return count_; }

  DFLASH_INLINE PackedKeyTile<kKeys> operator[](int i) const {
    const int begin = i * kKeys, jump = lo_[1] - seam_ - lo_[0];
    PackedKeyTile<kKeys> tile{lo_[0] + begin, min(seam_ - begin, kKeys), jump, false};
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

// Hides the scores that the thread's two rows do not see.
template <int kCount>
DFLASH_INLINE void hide(float (&s)[kCount], const RowBounds (&rows)[2], const PackedKeyTile<2 * kCount>& tile) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int granule = 0; granule < kCount / 8; ++granule) {
    const int first = tile.first + column + granule * kGranule + (granule * kGranule < tile.seam ? 0 : tile.jump);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (!rows[accumulator_row(i)].sees(first + accumulator_column(i))) s[granule * 8 + i] = -kInfinity;
    }
  }
}

}  // namespace dflash::DFLASH_ISA::sm90
