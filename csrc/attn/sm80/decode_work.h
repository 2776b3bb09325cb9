// The work of one portable decode launch, as one list. An item is a tile of the plan with one key head and some of its
// query heads. Its keys are cut into units at multiples of the unit's length. The list holds the units of all items one
// after another, and every block takes an equal range of it. Blocks derive all of this from the plan on the device.
#pragma once

#include "attn/aligned_key_tiles.h"
#include "attn/decode.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA::sm80 {

// What the launcher computes once for all blocks.
struct DecodeProblem : DecodeParams {
  int tiles, replicas;  // items are tiles of the plan times replicas
  int parts, head_tiles, fold, positions;
  int fragments;   // of 8 columns, in a row
  int unit_shift;  // a unit is 1 << unit_shift keys
  int stages;
  bool q_aligned, kv_aligned;  // rows begin at multiples of 16 bytes
  uint32_t* counters;          // [blocks of the grid]: for the blocks that share an item
  float4* partial_out;         // [slots, kDecodeRows / 16, head_dim / 8, 32]: sums of exp2(score - maximum) * value
  float2* partial_stats;       // [slots, kDecodeRows]: the maximum (-inf: no key was seen), the sum of exponentials

  // Where 16 rows' eight columns begin.
  DFLASH_INLINE float4* part(int slot, int row_group, int fragment) const {
    const int index = (slot * (kDecodeRows / 16) + row_group) * fragments + fragment;
    return partial_out + int64_t(index) * 32;
  }

  DFLASH_INLINE const TilePlan* tile_plans() const { return reinterpret_cast<const TilePlan*>(plan); }
  DFLASH_INLINE TilePlan tile_plan(int tile) const { return tile_plans()[tile]; }
};

// The units of one tile's keys. A tile without keys has one unit, so that its rows are written.
struct Units : AlignedKeyTiles {
  Units() = default;
  DFLASH_INLINE Units(const TilePlan& plan, int shift)
      : AlignedKeyTiles(plan, 1 << shift, [shift](int key) { return key >> shift; }) {
    count = max(count, 1);
  }
};

struct DecodeItem {
  int tile, replica;
  int first, count;  // its units in the list

  DFLASH_INLINE void next(const DecodeProblem& p) {
    first += count;
    if (++replica < p.replicas) return;
    replica = 0;
    if (++tile < p.tiles) count = Units(p.tile_plan(tile), p.unit_shift).count;
  }
};

// The place of a row in its tile, which is the same for all items.
struct RowPlace {
  int16_t position, head;

  RowPlace() = default;
  DFLASH_INLINE RowPlace(const DecodeProblem& p, int row)
      : position(static_cast<int16_t>(row / p.fold)), head(static_cast<int16_t>(row % p.fold)) {}
};

// The rows of an item.
struct ItemRows {
  int batch, kv_head;
  int head, heads;       // the first query head, how many
  int first, positions;  // the first position, how many

  ItemRows() = default;
  DFLASH_INLINE ItemRows(const DecodeProblem& p, const TilePlan& plan, int replica) {
    const int kv_heads = static_cast<int>(p.kv_heads), group = static_cast<int>(p.heads) / kv_heads;
    const int with_part = replica / p.head_tiles, head_tile = replica - with_part * p.head_tiles;
    const int outer = with_part / p.parts, part = with_part - outer * p.parts;
    first = plan.first + part * p.positions;
    positions = max(min(p.positions, static_cast<int>(p.q_len) - first), 0);
    batch = outer / kv_heads;
    kv_head = outer - batch * kv_heads;
    head = kv_head * group + head_tile * p.fold;
    heads = min(p.fold, group - head_tile * p.fold);
    if (p.plan_entries > 1) batch = plan.entry;
  }

  DFLASH_INLINE bool has(RowPlace row) const { return row.position < positions && row.head < heads; }

  // Where the row begins in a tensor of queries or outputs.
  DFLASH_INLINE int64_t offset(const HeadStrides& strides, RowPlace row) const {
    return batch * strides.batch + (head + row.head) * strides.head + (first + row.position) * strides.row;
  }
};

// An item that the block works on.
struct Job {
  DecodeItem item;
  ItemRows rows;
  int lo[2], hi[2];  // two runs of keys that hold all keys that rows see

  DFLASH_INLINE bool needs(int key) const { return (key >= lo[0] && key < hi[0]) || (key >= lo[1] && key < hi[1]); }
};

// A visit to one key tile of a job.
struct Step {
  int unit;  // of the list
  int job;
  int key;         // the tile's first
  bool is_inside;  // all its keys are needed
  bool is_full;    // all rows see all its keys
  bool begins_job, ends_unit, ends_item;
};

// A block's way through its units, one key tile after another. It lies in shared memory: one thread adds steps ahead of
// time, and all threads read them. Step i and its job remain until step i + kSteps is added.
template <int kKeys, int kSteps>
class Itinerary {
 public:
  DFLASH_INLINE void start(const DecodeProblem& p, const DecodeItem& item, int unit, int end) {
    count_ = 0;
    job_ = 0;
    unit_ = unit;
    end_ = end;
    enter(p, item);
  }

  DFLASH_INLINE void add(const DecodeProblem& p) {
    Step& step = steps_[count_];
    count_ = count_ + 1 == kSteps ? 0 : count_ + 1;
    step.unit = unit_;
    if (unit_ == end_) return;
    if (unit_ == jobs_[job_].item.first + jobs_[job_].item.count) {
      DecodeItem item = jobs_[job_].item;
      item.next(p);
      job_ = job_ + 1 == kSteps ? 0 : job_ + 1;
      enter(p, item);
    }
    const DecodeItem& item = jobs_[job_].item;
    const int key = (units_[unit_ - item.first] << p.unit_shift) + offset_;
    bool is_inside = false, is_full = false;
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      is_inside |= key >= plan_.lo[run] && key + kKeys <= plan_.hi[run];
      is_full |= key >= plan_.full_lo[run] && key + kKeys <= plan_.full_hi[run];
    }
    offset_ += kKeys;
    const bool ends_unit = offset_ >> p.unit_shift != 0;
    step.job = job_;
    step.key = key;
    step.is_inside = is_inside;
    step.is_full = is_full;
    step.begins_job = is_new_;
    step.ends_unit = ends_unit;
    step.ends_item = ends_unit && unit_ + 1 == item.first + item.count;
    is_new_ = false;
    if (ends_unit) {
      offset_ = 0;
      ++unit_;
    }
  }

  DFLASH_INLINE const Step& operator[](unsigned i) const { return steps_[i % kSteps]; }
  DFLASH_INLINE const Job& job(const Step& step) const { return jobs_[step.job]; }

 private:
  DFLASH_INLINE void enter(const DecodeProblem& p, const DecodeItem& item) {
    plan_ = p.tile_plan(item.tile);
    units_ = Units(plan_, p.unit_shift);
    offset_ = 0;
    is_new_ = true;
    jobs_[job_] = {item, {p, plan_, item.replica}, {plan_.lo[0], plan_.lo[1]}, {plan_.hi[0], plan_.hi[1]}};
  }

  Step steps_[kSteps];
  Job jobs_[kSteps];
  TilePlan plan_;
  Units units_;
  int count_, job_;  // the places of the next step and of the current job
  int unit_, end_, offset_;
  bool is_new_;
};

// A block's range of the list. All ranges have the same length, except that the first few are one unit longer.
struct WorkRange {
  int begin = 0, end = 0;
  int blocks;             // how many blocks have a range
  int length, remainder;  // of a range, and how many are longer
  DecodeItem item;        // the item of unit `begin`

  WorkRange() = default;

  // Every warp computes the range by itself; its lanes take equal runs of tiles.
  DFLASH_INLINE explicit WorkRange(const DecodeProblem& p) {
    const int lane = threadIdx.x % 32, each = (p.tiles + 31) / 32;
    const int tile = min(lane * each, p.tiles), tiles_end = min(tile + each, p.tiles);
    const auto count = [&](int i) { return Units(p.tile_plan(i), p.unit_shift).count; };
    int own = 0;
#pragma unroll 1
    for (int i = tile; i < tiles_end; ++i) own += count(i);
    int before = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, before, distance);
      if (lane >= distance) before += other;
    }
    const int total = __shfl_sync(~0u, before, 31) * p.replicas;
    before -= own;
    blocks = max(min(static_cast<int>(gridDim.x), total), 1);
    length = total / blocks;
    remainder = total - length * blocks;
    const int block = blockIdx.x;
    if (block >= blocks) return;
    begin = first_of(block);
    end = first_of(block + 1);

    // The lane whose tiles hold `begin` finds its item.
    item = {tile, 0, before * p.replicas, 0};
    const bool is_here = begin >= item.first && begin < item.first + own * p.replicas;
    if (is_here) {
      item.count = count(item.tile);
      while (begin >= item.first + item.count * p.replicas) {
        item.first += item.count * p.replicas;
        item.count = count(++item.tile);
      }
    }
    const int finder = __ffs(__ballot_sync(~0u, is_here)) - 1;
    item.tile = __shfl_sync(~0u, item.tile, finder);
    item.count = __shfl_sync(~0u, item.count, finder);
    item.first = __shfl_sync(~0u, item.first, finder);
    item.replica = (begin - item.first) / item.count;
    item.first += item.replica * item.count;
  }

  DFLASH_INLINE bool begins(const DecodeItem& item) const { return item.first >= begin; }
  DFLASH_INLINE bool holds(const DecodeItem& item) const { return begins(item) && item.first + item.count <= end; }

  DFLASH_INLINE int first_of(int block) const { return block * length + min(block, remainder); }
  DFLASH_INLINE int block_of(int unit) const {
    const int longer = remainder * (length + 1);
    return unit < longer ? unit / (length + 1) : remainder + (unit - longer) / length;
  }
};

}  // namespace dflash::DFLASH_ISA::sm80
