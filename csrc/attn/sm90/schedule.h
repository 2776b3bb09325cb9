// How the blocks of a persistent grid share the items of a forward: tiles of a plan times groups of folded heads.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>

#include "attn/plan.h"
#include "common/device.h"

namespace dflash {

namespace DFLASH_ISA::sm90 {

// Which items a block takes, and in what order.
//
// Items are dealt in rounds, from the longest tiles of the plan to the shortest. Every other round goes through the
// blocks in the opposite direction, so that the block with the longest item of a round gets the shortest of the next.
//
// Heads are cut into sections whose keys and values fit in the L2 cache together. A block takes all its items of one
// section before those of the next.
struct Schedule {
  int fold_shift;          // 1 << fold_shift query heads are folded into a tile's rows
  unsigned heads, groups;  // groups of folded heads: of all batch entries that a tile of the plan serves; of one entry
  unsigned section;        // groups of a section
  unsigned items;

  // The block's item of a round; at least `items` once there are no more.
  DFLASH_INLINE unsigned item(unsigned round) const {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
  DFLASH_INLINE unsigned section_of(unsigned item) const { return item % heads / section; }
};

// A block's way through its items.
class ScheduledItems {
 public:
  // Returns the next item. There must be one: a block has an item for every round whose item(round) is below `items`.
  DFLASH_INLINE unsigned next(const Schedule& schedule) {
    for (;;) {
      const unsigned item = schedule.item(round_++);
      if (item >= schedule.items) {
        round_ = 0;
        ++section_;
      } else if (schedule.section_of(item) == section_) {
        return item;
      }
    }
  }

 private:
  unsigned section_ = 0, round_ = 0;  // where the search goes on
};

}  // namespace DFLASH_ISA::sm90

// Items are counted in 32 bits, and the last round goes a little beyond the last item.
constexpr int64_t kMaxScheduledItems = int64_t(1) << 31;

// Groups of folded heads, of all batch entries that a tile of the plan serves.
inline int64_t scheduled_heads(const AttentionForwardParams& p) {
  return p.heads / fold_of(p.heads, p.kv_heads) * (p.batch / p.plan_entries);
}

inline int64_t scheduled_items(const AttentionForwardParams& p, int64_t rows_per_tile) {
  return p.plan_entries * tiles_of(p.q_len, rows_per_tile / fold_of(p.heads, p.kv_heads)) * scheduled_heads(p);
}

inline DFLASH_ISA::sm90::Schedule make_schedule(const AttentionForwardParams& p, int64_t items) {
  // The L2 cache keeps about this much of keys and values beside the data that streams through it.
  constexpr int64_t kCachedBytes = 36 << 20;
  const int64_t fold = fold_of(p.heads, p.kv_heads), heads = scheduled_heads(p);
  const int64_t bytes = p.batch * p.kv_heads * p.kv_len * p.head_dim * 2 * 2;
  const int64_t sections = std::clamp<int64_t>((bytes + kCachedBytes - 1) / kCachedBytes, 1, heads);
  const int64_t section = (heads + sections - 1) / sections;
  const auto narrow = [](int64_t x) { return static_cast<unsigned>(x); };
  return {std::countr_zero(narrow(fold)), narrow(heads), narrow(p.heads / fold), narrow(section), narrow(items)};
}

}  // namespace dflash
