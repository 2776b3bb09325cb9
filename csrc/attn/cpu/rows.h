// Which keys rows see. A panel is as many rows as a register block is wide, one row in each lane.
#pragma once

#include "attn/cpu/block.h"
#include "attn/params.h"

namespace dflash::DFLASH_ISA {

struct Range {
  int64_t begin = 0, end = 0;

  DFLASH_MEMBER bool empty() const { return begin >= end; }
  DFLASH_MEMBER bool contains(Range other) const { return begin <= other.begin && other.end <= end; }
  DFLASH_MEMBER Range intersect(Range other) const {
    return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
  }
  // Returns the smallest range that holds both.
  DFLASH_MEMBER Range unite(Range other) const {
    if (empty()) return other;
    if (other.empty()) return *this;
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
};

// The two intervals of one row. Empty intervals are {0, 0}.
struct Visible {
  Range context, block;

  DFLASH_MEMBER bool empty() const { return context.empty() && block.empty(); }
};

// Returns what position i of batch entry b sees among `keys`.
DFLASH_INLINE Visible visible_at(const Intervals& mask, int64_t b, int64_t i, Range keys) {
  const int64_t at = b * mask.batch + i;
  const Range context = keys.intersect({mask.ctx_lo[at], mask.ctx_hi[at]});
  const Range block = keys.intersect({mask.blk_lo[at], mask.blk_hi[at]});
  return {context.empty() ? Range{} : context, block.empty() ? Range{} : block};
}

// An unsigned integer as wide as Real, so that comparisons of keys select lanes of scores.
template <class Real>
struct KeyIndex {
  using type = uint32_t;
};
template <>
struct KeyIndex<double> {
  using type = uint64_t;
};

template <class Block>
struct Panel {
  using B = Block;
  using Key = typename KeyIndex<typename B::Number>::type;
  using Index = Vector<Key, B::kLanes>;

  // For each row, where an interval begins and how long it is.
  Index context_begin[B::kVectors], context_length[B::kVectors];
  Index block_begin[B::kVectors], block_length[B::kVectors];
  // The first holds all keys that some row sees; the second is what all rows see.
  Visible any, all;

  // row: 0 to kWidth - 1, in this order.
  DFLASH_MEMBER void set(int row, const Visible& visible) {
    const int n = row / B::kLanes, lane = row % B::kLanes;
    context_begin[n][lane] = visible.context.begin;
    context_length[n][lane] = visible.context.end - visible.context.begin;
    block_begin[n][lane] = visible.block.begin;
    block_length[n][lane] = visible.block.end - visible.block.begin;
    any = row == 0 ? visible : Visible{any.context.unite(visible.context), any.block.unite(visible.block)};
    all = row == 0 ? visible : Visible{all.context.intersect(visible.context), all.block.intersect(visible.block)};
  }

  // Returns the part of a key tile that must be visited, in whole steps of kHeight from the tile's begin.
  DFLASH_MEMBER Range part_of(Range tile) const {
    const Range part = tile.intersect(any.context).unite(tile.intersect(any.block));
    if (part.empty()) return {};
    const int64_t begin = (part.begin - tile.begin) / B::kHeight * B::kHeight;
    const int64_t end = (part.end - tile.begin + B::kHeight - 1) / B::kHeight * B::kHeight;
    return {tile.begin + begin, tile.begin + end};
  }

  DFLASH_MEMBER bool all_see(Range keys) const { return all.context.contains(keys) || all.block.contains(keys); }

  // Returns a mask of the lanes of vector n whose rows see a key.
  DFLASH_MEMBER auto sees(int n, int64_t key) const {
    const Index k = Index{} + Key(key);
    return (k - context_begin[n] < context_length[n]) | (k - block_begin[n] < block_length[n]);
  }
};

}  // namespace dflash::DFLASH_ISA
