// The producer of Hopper's decode kernel: a warp that starts all loads of a block.
#pragma once

#include "attn/sm90/decode_tiling.h"

namespace dflash::DFLASH_ISA::sm90 {

// A tile of keys is one box, or several where pages are smaller; lane i knows where box i of a tile lies, and lane 0
// loads them all. Every tile takes this warp's time, which must not be longer than the memory's. Therefore the warp
// keeps the slice in registers, divides and reads the block table only where a page ends, and gives the copy engine
// coordinates that all lanes share, which go to its registers without a loop over lanes.
template <class Tiling>
struct DecodeProducer {
  const DecodeBlock<Tiling>& block;
  const DecodeSlice<Tiling::kKeys> slice = block.shared.slice;
  const int lane = threadIdx.x % 32, boxes = Tiling::kKeys / block.layout.box_keys;
  const int seen = max(slice.plan.hi[0], slice.plan.hi[1]);  // no row sees this key, nor the ones behind it
  Stage<Tiling::kStages> stage{0, 1};
  int visit = slice.begin;

  // Where the lane's box of this visit lies: its first key, counted from the row's first and from the page's, the page's
  // number in the row, and the page or batch entry. The block table is read one tile ahead.
  struct Box {
    int key = 0, within = 0, number = -1, entry = 0;
  } next;

  // Loads tiles of keys that were there before this forward, as many as there are stages for.
  DFLASH_INLINE void load_context() {
    const int end = slice.plan.full_hi[0] - static_cast<int>(block.p.q_len);
    locate();
    for (int i = 0; i < Tiling::kStages; ++i) {
      if (visit >= slice.end || slice.key(visit) + Tiling::kKeys > end) break;
      load_tile();
    }
  }

  // Loads the queries, and all tiles that are not loaded yet.
  DFLASH_INLINE void load_the_rest() {
    load_queries();
    locate();
    while (visit < slice.end) load_tile();
  }

 private:
  DFLASH_INLINE void load_tile() {
    const Box box = next;
    visit = slice.from(visit + 1);
    locate();
    load(block.shared.k, block.maps.k, block.keys_at(stage.index), box);
    load(block.shared.v, block.maps.v, block.values_at(stage.index), box);
    stage.advance();
  }

  DFLASH_INLINE void load_queries() {
    const DecodeLayout& layout = block.layout;
    Mbarrier& full = block.shared.q_full;
    const int rows = Tiling::kConsumers * layout.fold * layout.positions;
    if (lane == 0) full.arrive_and_expect_tx(rows * Tiling::kPanels * kPanelRowBytes);
    __syncwarp();
    if (lane < Tiling::kConsumers * Tiling::kPanels) {
      const int consumer = lane / Tiling::kPanels, panel = lane % Tiling::kPanels;
      tma_load(block.queries + lane * kQueryPanelBytes, block.maps.q, panel * kPanelColumns,
               slice.kv_head * layout.fold, slice.plan.first + consumer * layout.positions, slice.batch, full);
    }
  }

  // Sets `next` for this visit. An entry of the block table that is no page lies outside the tensor, so that the box
  // becomes zeros, and so does a box that no row sees.
  DFLASH_INLINE void locate() {
    const Pages& pages = block.p.pages;
    const int key = slice.key(visit) + lane * block.layout.box_keys, size = static_cast<int>(pages.page_size);
    next.within += key - next.key;
    next.key = key;
    if (pages.table == nullptr) {
      next.entry = slice.batch;
      return;
    }
    if (lane >= boxes || visit >= slice.end || key >= seen) {
      next.entry = next.number = -1;
      return;
    }
    if (next.number >= 0 && next.within < size) return;
    next.number = key / size;
    next.within = key - next.number * size;
    next.entry = next.number < pages.max_pages ? pages.table[slice.batch * pages.max_pages + next.number] : -1;
  }

  DFLASH_INLINE void load(Ring<Tiling::kStages>& ring, const CUtensorMap& map, uint32_t to, const Box& box) const {
    ring.empty[stage.index].wait(stage.parity);
    if (lane == 0) ring.full[stage.index].arrive_and_expect_tx(Tiling::kKeyBytes);
#pragma unroll 1
    for (int i = 0; i < boxes; ++i) {
      const int within = uniform(__shfl_sync(~0u, box.within, i)), entry = uniform(__shfl_sync(~0u, box.entry, i));
      const uint32_t at = uniform(to + i * block.layout.box_keys * kPanelRowBytes);
      if (lane > 0) continue;
#pragma unroll
      for (int panel = 0; panel < Tiling::kPanels; ++panel) {
        tma_load(at + panel * Tiling::kKeyPanelBytes, map, panel * kPanelColumns, within, slice.kv_head, entry,
                 ring.full[stage.index]);
      }
    }
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
