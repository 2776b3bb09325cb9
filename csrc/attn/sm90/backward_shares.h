// How the blocks of the Hopper backward share the work of a section.
#pragma once

#include "attn/backward.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA::sm90 {

// The work on the tiles of keys of one key head, within its section. The work on a tile of keys is the tiles of rows
// that see it, in all head groups, and a constant for beginning and ending it. Every block has an equal share of the
// section's work.
class HeadWork {
 public:
  DFLASH_INLINE HeadWork(const BackwardParams& p, int64_t head)
      : seen_(seen_of(p, head)), groups_(p.heads / p.kv_heads / p.fold), blocks_(p.blocks) {
    const int64_t first = head / p.section_heads * p.section_heads;
    const int64_t end = min(first + p.section_heads, p.batch * p.kv_heads);
    if (p.entries == 1) {  // the work on all heads is the same
      const int64_t work = before(seen_, p.key_tiles);
      begin_ = (head - first) * work;
      total_ = (end - first) * work;
      return;
    }
    for (int64_t other = first; other < end; ++other) {
      if (other == head) begin_ = total_;
      total_ += before(seen_of(p, other), p.key_tiles);
    }
  }

  // How many tiles of rows of one head group see a tile of keys.
  DFLASH_INLINE int per_group(int64_t key_tile) const { return seen_[key_tile + 1] - seen_[key_tile]; }
  // How many tiles of rows see it in all head groups.
  DFLASH_INLINE int64_t units(int64_t key_tile) const { return per_group(key_tile) * groups_; }
  DFLASH_INLINE int64_t weight(int64_t key_tile) const { return units(key_tile) + kHopperBackwardOverhead; }

  // Where the work on a tile of keys begins.
  DFLASH_INLINE int64_t begin(int64_t key_tile) const { return begin_ + before(seen_, key_tile); }

  // Where the share of a block begins, and the block whose share holds a place.
  DFLASH_INLINE int64_t share(int64_t block) const { return total_ * block / blocks_; }
  DFLASH_INLINE int64_t block_at(int64_t place) const { return ((place + 1) * blocks_ + total_ - 1) / total_ - 1; }

 private:
  static DFLASH_INLINE const int32_t* seen_of(const BackwardParams& p, int64_t head) {
    return p.seen + (p.entries == 1 ? 0 : head / p.kv_heads) * (p.key_tiles + 1);
  }
  DFLASH_INLINE int64_t before(const int32_t* seen, int64_t key_tile) const {
    return seen[key_tile] * groups_ + key_tile * kHopperBackwardOverhead;
  }

  const int32_t* seen_;
  int64_t groups_, blocks_, begin_ = 0, total_ = 0;
};

}  // namespace dflash::DFLASH_ISA::sm90
