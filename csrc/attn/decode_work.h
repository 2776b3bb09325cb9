// What there is to do in one decoding step, as one list. An item is a tile of the plan with a key head and a part of
// its query heads; its keys are cut into units at multiples of the unit's length. The list holds the units of all items
// one after another, and every block takes an equal run of them. All of it follows from the plan on the device.
#pragma once

#include "attn/decode.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA {

// What the launcher works out once for all blocks.
struct DecodeProblem : DecodeParams {
  int tiles, replicas;  // items are tiles of the plan times replicas
  int head_tiles, fold, positions;
  int unit_shift;  // a unit is 1 << unit_shift keys
  int min_units;   // a block takes no fewer, as long as there are any
  int stages;
  bool is_aligned;  // rows of q, k and v begin at multiples of 16 bytes
  float* partial_out;     // [slots, kDecodeRows, head_dim]: sums of exp2(score - maximum) * value
  float2* partial_stats;  // [slots, kDecodeRows]: the maximum (-inf: no key was seen), the sum of exponentials

  DFLASH_INLINE TilePlan tile_plan(int tile) const { return reinterpret_cast<const TilePlan*>(plan)[tile]; }
};

// The units of one tile's keys. A tile without keys has one all the same, so that its rows are written.
struct Units {
  int first[2];  // of each run, counted from key 0
  int of_first_run, count;

  Units() = default;
  DFLASH_INLINE Units(const TilePlan& plan, int shift) {
    const int round = (1 << shift) - 1;
    int end = 0;
    count = 0;
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      of_first_run = count;
      first[run] = max(plan.lo[run] >> shift, end);
      if (plan.lo[run] < plan.hi[run]) {
        end = max(end, (plan.hi[run] + round) >> shift);
        count += end - first[run];
      }
    }
    count = max(count, 1);
  }

  DFLASH_INLINE int operator[](int i) const { return i < of_first_run ? first[0] + i : first[1] + i - of_first_run; }
};

struct Item {
  int tile, replica;
  int first, count;  // its units in the list

  DFLASH_INLINE void next(const DecodeProblem& p) {
    first += count;
    if (++replica < p.replicas) return;
    replica = 0;
    if (++tile < p.tiles) count = Units(p.tile_plan(tile), p.unit_shift).count;
  }
};

// The rows of an item.
struct ItemRows {
  int batch, kv_head, head, heads;  // the first query head, how many
  int first, end, fold;             // positions

  ItemRows() = default;
  DFLASH_INLINE ItemRows(const DecodeProblem& p, const TilePlan& plan, int replica)
      : first(plan.first), end(min(plan.first + p.positions, static_cast<int>(p.q_len))), fold(p.fold) {
    const int kv_heads = static_cast<int>(p.kv_heads), group = static_cast<int>(p.heads) / kv_heads;
    const int head_tile = replica % p.head_tiles, outer = replica / p.head_tiles;
    batch = p.plan_entries > 1 ? plan.entry : outer / kv_heads;
    kv_head = outer % kv_heads;
    head = kv_head * group + head_tile * fold;
    heads = min(fold, group - head_tile * fold);
  }

  DFLASH_INLINE int count() const { return (end - first) * fold; }
  DFLASH_INLINE bool has(int row) const { return row < count() && row % fold < heads; }
  DFLASH_INLINE int position(int row) const { return first + row / fold; }

  // Where the row begins in a tensor of queries or outputs.
  DFLASH_INLINE int64_t offset(const HeadStrides& strides, int row) const {
    return batch * strides.batch + (head + row % fold) * strides.head + position(row) * strides.row;
  }
};

// A visit to one key tile of an item.
struct Step {
  Item item;
  ItemRows rows;
  int unit;             // of the list
  int key;              // the tile's first
  int lo[2], hi[2];     // runs of the keys that rows may see
  bool is_full;         // all rows see all keys of the tile
  bool ends_unit, ends_item;

  DFLASH_INLINE bool needs(int key) const { return (key >= lo[0] && key < hi[0]) || (key >= lo[1] && key < hi[1]); }
};

// Goes from key tile to key tile, and from item to item. One thread does; the rest of the block reads its steps.
template <int kKeys>
class Walk {
 public:
  DFLASH_INLINE void start(const DecodeProblem& p, const Item& item, int unit) {
    item_ = item;
    unit_ = unit;
    offset_ = 0;
    enter(p);
  }

  DFLASH_INLINE Step step(const DecodeProblem& p) const {
    Step step{item_, rows_, unit_};
    step.key = (units_[unit_ - item_.first] << p.unit_shift) + offset_;
    step.is_full = false;
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      step.lo[run] = plan_.lo[run];
      step.hi[run] = plan_.hi[run];
      step.is_full |= step.key >= plan_.full_lo[run] && step.key + kKeys <= plan_.full_hi[run];
    }
    step.ends_unit = (offset_ + kKeys) >> p.unit_shift != 0;
    step.ends_item = step.ends_unit && unit_ + 1 == item_.first + item_.count;
    return step;
  }

  DFLASH_INLINE void next(const DecodeProblem& p) {
    offset_ += kKeys;
    if (offset_ >> p.unit_shift == 0) return;
    offset_ = 0;
    if (++unit_ < item_.first + item_.count) return;
    item_.next(p);
    if (item_.tile < p.tiles) enter(p);
  }

 private:
  DFLASH_INLINE void enter(const DecodeProblem& p) {
    plan_ = p.tile_plan(item_.tile);
    units_ = Units(plan_, p.unit_shift);
    rows_ = ItemRows(p, plan_, item_.replica);
  }

  Item item_;
  ItemRows rows_;
  TilePlan plan_;
  Units units_;
  int unit_, offset_;
};

// A block's run of units.
struct Share {
  int begin = 0, end = 0;
  int total, blocks;  // units of all blocks, blocks that have any
  Item item;          // what `begin` belongs to

  template <int kWarps>
  struct Scratch {
    int sums[kWarps];
    Item found;
  };

  // All threads of the block take part.
  template <int kWarps>
  static DFLASH_INLINE Share of_block(const DecodeProblem& p, Scratch<kWarps>& scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int each = (p.tiles + kWarps * 32 - 1) / (kWarps * 32);
    const int tile = min(static_cast<int>(threadIdx.x) * each, p.tiles), tiles_end = min(tile + each, p.tiles);
    const auto count = [&](int i) { return Units(p.tile_plan(i), p.unit_shift).count; };
    int own = 0;
    for (int i = tile; i < tiles_end; ++i) own += count(i);
    int before = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, before, distance);
      if (lane >= distance) before += other;
    }
    if (lane == 31) scratch.sums[warp] = before;
    __syncthreads();
    before -= own;
    int total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += scratch.sums[i];
      total += scratch.sums[i];
    }
    Share share;
    share.total = total * p.replicas;
    share.blocks = max(min(static_cast<int>(gridDim.x), share.total / p.min_units), 1);
    const int block = blockIdx.x;
    if (block >= share.blocks) return share;
    share.begin = share.first_of(block);
    share.end = share.first_of(block + 1);

    // The thread whose tiles hold `begin` says which item that is.
    int first = before * p.replicas;
    if (share.begin >= first && share.begin < first + own * p.replicas) {
      int i = tile, units = count(i);
      while (share.begin >= first + units * p.replicas) {
        first += units * p.replicas;
        units = count(++i);
      }
      const int replica = (share.begin - first) / units;
      scratch.found = {i, replica, first + replica * units, units};
    }
    __syncthreads();
    share.item = scratch.found;
    return share;
  }

  DFLASH_INLINE bool begins(const Item& item) const { return item.first >= begin; }
  DFLASH_INLINE bool holds(const Item& item) const { return begins(item) && item.first + item.count <= end; }

  DFLASH_INLINE int first_of(int block) const { return static_cast<int>(int64_t(block) * total / blocks); }
  DFLASH_INLINE int block_of(int unit) const { return static_cast<int>((int64_t(unit + 1) * blocks - 1) / total); }
};

}  // namespace dflash::DFLASH_ISA
