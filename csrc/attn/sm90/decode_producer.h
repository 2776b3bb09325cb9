// The producer of Hopper's decode kernel: a warp that starts all loads of a block.
#pragma once

#include "attn/sm90/decode_tiling.h"

namespace dflash::DFLASH_ISA::sm90 {

// Lane i loads box i of each tile: a panel of a page's keys, or of the whole tile's.
template <class Tiling>
struct DecodeProducer {
  const DecodeBlock<Tiling>& block;
  const DecodeSlice<Tiling::kKeys>& slice = block.shared.slice;
  const int lane = threadIdx.x % 32, panel = lane % Tiling::kPanels;
  const int key = lane / Tiling::kPanels * block.layout.box_keys;  // the box's first, counted from the tile's
  const bool has_box = key < Tiling::kKeys;
  Stage<Tiling::kStages> stage{0, 1};
  int visit = slice.begin;
  int2 next{};  // where the lane's box of this visit lies: the block table is read one tile ahead

  // Loads tiles that lie before the second run of the plan's tile, as many as there are stages for.
  DFLASH_INLINE void load_context() {
    const int end = slice.plan.lo[1] < slice.plan.hi[1] ? slice.plan.lo[1] : 0;
    next = locate(visit);
    for (int i = 0; i < Tiling::kStages; ++i) {
      if (visit >= slice.end || slice.key(visit) + Tiling::kKeys > end) break;
      load_tile();
    }
  }

  // Loads the queries, and all tiles that are not loaded yet.
  DFLASH_INLINE void load_the_rest() {
    load_queries();
    next = locate(visit);
    while (visit < slice.end) load_tile();
  }

 private:
  DFLASH_INLINE void load_tile() {
    const int2 from = next;
    visit = slice.from(visit + 1);
    next = locate(visit);
    load(block.shared.k, block.maps.k, block.keys_at(stage.index), from);
    load(block.shared.v, block.maps.v, block.values_at(stage.index), from);
    stage.advance();
  }

  DFLASH_INLINE void load_queries() {
    const DecodeLayout& layout = block.layout;
    Mbarrier& full = block.shared.q_full;
    const int rows = Tiling::kConsumers * layout.fold * layout.positions;
    if (lane == 0) full.arrive_and_expect_tx(rows * Tiling::kPanels * kPanelRowBytes);
    __syncwarp();
    if (lane < Tiling::kConsumers * Tiling::kPanels) {
      const int consumer = lane / Tiling::kPanels;
      tma_load(block.queries + lane * kQueryPanelBytes, block.maps.q, panel * kPanelColumns,
               slice.kv_head * layout.fold, slice.plan.first + consumer * layout.positions, slice.batch, full);
    }
  }

  // Returns where the lane's box of visit i lies: the page or batch entry, and the row in it. For an entry of the block
  // table that is no page this lies outside the tensor, so that the box becomes zeros.
  DFLASH_INLINE int2 locate(int i) const {
    const Pages& pages = block.p.pages;
    const int at = slice.key(i) + key;
    if (pages.table == nullptr) return {slice.batch, at};
    const int size = static_cast<int>(pages.page_size), page = at / size;
    const bool is_seen = has_box && i < slice.end && at < max(slice.plan.hi[0], slice.plan.hi[1]);
    const bool exists = is_seen && page < pages.max_pages;
    return {exists ? pages.table[slice.batch * pages.max_pages + page] : -1, at - page * size};
  }

  DFLASH_INLINE void load(Ring<Tiling::kStages>& ring, const CUtensorMap& map, uint32_t to, int2 from) const {
    ring.empty[stage.index].wait(stage.parity);
    if (lane == 0) ring.full[stage.index].arrive_and_expect_tx(Tiling::kKeyBytes);
    __syncwarp();
    to += panel * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
    if (has_box) tma_load(to, map, panel * kPanelColumns, from.y, slice.kv_head, from.x, ring.full[stage.index]);
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
