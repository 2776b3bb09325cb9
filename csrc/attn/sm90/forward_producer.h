// The producer of the Hopper forward: one thread that starts all loads of a block.
#pragma once

#include "attn/sm90/forward_tiling.h"

namespace dflash::DFLASH_ISA::sm90 {

template <class Tiling>
class ForwardProducer {
 public:
  DFLASH_INLINE ForwardProducer(const AttentionForwardParams& p, const Schedule& schedule, const ForwardMaps& maps,
                                ForwardShared<Tiling>& shared, uint32_t memory)
      : p_(p),
        schedule_(schedule),
        maps_(maps),
        shared_(shared),
        q_(memory),
        k_(memory + Tiling::kKeysAt),
        v_(memory + Tiling::kValuesAt) {
    // At first every stage is empty.
    q_stage_.parity = k_stage_.parity = v_stage_.parity = 1;
  }

  DFLASH_INLINE void run() {
    Stage<Tiling::kItems> present, next;
    if (schedule_.item(0) < schedule_.items) publish(next.index);
    next.advance();
    for (unsigned round = 0; schedule_.item(round) < schedule_.items; ++round) {
      const ForwardItem& item = shared_.items[present.index];
      shared_.item_full[present.index].wait(present.parity);
      const PackedKeyTiles<Tiling::kKeys> tiles(item.plan);
      const int batch = item.batch, kv_head = item.first_head / static_cast<int>(p_.heads / p_.kv_heads);
      // When the consumers have released the queries of this stage, they no longer read the plan of that item either.
      shared_.q.empty[q_stage_.index].wait(q_stage_.parity);
      load_queries(item);
      if (schedule_.item(round + 1) < schedule_.items) publish(next.index);
      present.advance();
      next.advance();
      // Values follow one tile behind the keys.
      for (int i = 0; i <= tiles.count(); ++i) {
        if (i < tiles.count()) load(maps_.k, maps_.k_granule, shared_.k, k_stage_, k_, tiles[i], kv_head, batch);
        // The first values overwrite the previous item's output where that has no room of its own.
        if (!Tiling::kOwnOutput && i == min(1, tiles.count())) shared_.out_empty.wait((round + 1) % 2);
        if (i > 0) load(maps_.v, maps_.v_granule, shared_.v, v_stage_, v_, tiles[i - 1], kv_head, batch);
      }
    }
  }

 private:
  using KeyStage = Stage<Tiling::kStages>;

  // Starts loading the next item's entry of the plan, one item ahead.
  DFLASH_INLINE void publish(int slot) {
    const unsigned next = items_.next(schedule_), head = next % schedule_.heads;
    ForwardItem& item = shared_.items[slot];
    Mbarrier& full = shared_.item_full[slot];
    const TilePlan* plan = reinterpret_cast<const TilePlan*>(p_.plan) + next / schedule_.heads;
    item.batch = p_.plan_entries > 1 ? plan->entry : head / schedule_.groups;
    item.first_head = static_cast<int>(head % schedule_.groups << schedule_.fold_shift);
    full.arrive_and_expect_tx(sizeof(TilePlan));
    bulk_load(shared_address(&item.plan), plan, sizeof(TilePlan), full);
  }

  DFLASH_INLINE void load_queries(const ForwardItem& item) {
    Mbarrier& full = shared_.q.full[q_stage_.index];
    full.arrive_and_expect_tx(Tiling::kQueryBytes);
    uint32_t to = q_ + q_stage_.index * Tiling::kQueryBytes;
    for (int part = 0; part < Tiling::kRows / Tiling::kConsumerRows; ++part) {
      for (int panel = 0; panel < Tiling::kPanels; ++panel, to += kQueryPanelBytes) {
        tma_load(to, maps_.q, panel * kPanelColumns, item.first_head,
                 item.plan.first + part * (Tiling::kConsumerRows >> schedule_.fold_shift), item.batch, full);
      }
    }
    q_stage_.advance();
  }

  static DFLASH_INLINE void load(const CUtensorMap& map, const CUtensorMap& granule_map, Ring<Tiling::kStages>& ring,
                                 KeyStage& stage, uint32_t to, const PackedKeyTile<Tiling::kKeys>& tile, int kv_head,
                                 int batch) {
    ring.empty[stage.index].wait(stage.parity);
    Mbarrier& full = ring.full[stage.index];
    full.arrive_and_expect_tx(Tiling::kKeyBytes);
    to += stage.index * Tiling::kKeyBytes;
    for (int panel = 0; panel < Tiling::kPanels; ++panel, to += Tiling::kKeyPanelBytes) {
      const int column = panel * kPanelColumns;
      if (!tile.has_seam()) {
        tma_load(to, map, column, tile.first, kv_head, batch, full);
        continue;
      }
      for (int key = 0; key < Tiling::kKeys; key += kGranule) {
        tma_load(to + key * kPanelRowBytes, granule_map, column, tile.key(key), kv_head, batch, full);
      }
    }
    stage.advance();
  }

  const AttentionForwardParams& p_;
  const Schedule& schedule_;
  const ForwardMaps& maps_;
  ForwardShared<Tiling>& shared_;
  const uint32_t q_, k_, v_;
  Stage<Tiling::kQueryStages> q_stage_;
  KeyStage k_stage_, v_stage_;
  ScheduledItems items_;
};

}  // namespace dflash::DFLASH_ISA::sm90
