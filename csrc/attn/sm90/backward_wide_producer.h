// The producer of the wide Hopper backward. Its four warps share the work: one thread loads keys, a warp finds rows,
// and two threads load what the consumers need of them.
#pragma once

#include "attn/sm90/backward_wide_tiling.h"
#include "attn/sm90/seeing_rows.h"

namespace dflash::DFLASH_ISA::sm90 {

template <class Tiling>
class WideBackwardProducer {
  using Shared = WideBackwardShared<Tiling>;

 public:
  DFLASH_INLINE WideBackwardProducer(const BackwardParams& p, const BackwardLaunch& launch, Shared& shared,
                                     uint32_t memory)
      : p_(p), launch_(launch), shared_(shared), memory_(memory) {}

  DFLASH_INLINE void run() {
    if (threadIdx.x == 0) load_items();
    if (threadIdx.x / 32 == 1) find_all_rows();
    if (threadIdx.x == 64) load_queries();
    if (threadIdx.x == 96) load_gradients();
    __syncwarp();
  }

 private:
  // Walks over the cluster's items, and starts the loads of their keys and values. An item is known as soon as the one
  // before it has begun, so that its rows are found and loaded early.
  DFLASH_INLINE void load_items() {
    uint32_t turn = 0;
#pragma unroll 1
    for (int section = 0; section < static_cast<int>(p_.sections); ++section) {
      int place = p_.first_items[section * static_cast<int>(p_.blocks) + blockIdx.x / Tiling::kBlocks];
      if (place < 0) continue;
      BackwardItem* item;
#pragma unroll 1
      do {
        item = &next_slot(turn);
        *item = p_.items[place++];
        shared_.item_full[turn % 2].arrive();
        shared_.kv_empty.wait(turn++ % 2 ^ 1);
        load_keys(*item);
      } while (!item->is_last);
    }
    next_slot(turn).key_tile = -1;
    shared_.item_full[turn % 2].arrive();
    shared_.kv_empty.wait(turn % 2 ^ 1);
    shared_.kv_full.arrive();
  }

  // Where the next item goes. The consumers are done with the item that lies there, because kv_empty said so.
  DFLASH_INLINE BackwardItem& next_slot(uint32_t turn) {
    shared_.item_empty[turn % 2].wait(turn / 2 % 2 ^ 1);
    return shared_.items[turn % 2];
  }

  DFLASH_INLINE void load_keys(const BackwardItem& item) {
    constexpr int kOtherKeyPanels = Tiling::kSplitsColumns ? 0 : Tiling::kGradQPanels;
    const int rank = opaque(blockIdx.x) % Tiling::kBlocks;
    shared_.kv_full.arrive_and_expect_tx((2 * Tiling::kPanels + kOtherKeyPanels) * Tiling::kPanelBytes);
    const auto load = [&](int at, const CUtensorMap& map, int panel, int block) {
      tma_load(memory_ + at, map, Tiling::first_column(rank) + panel * kPanelColumns, Tiling::first_key(item, block),
               item.kv_head, item.batch, shared_.kv_full);
    };
#pragma unroll 1
    for (int panel = 0; panel < Tiling::kPanels; ++panel) {
      load(panel * Tiling::kPanelBytes, launch_.k, panel, rank);
      load(panel * Tiling::kPanelBytes + Tiling::kValuesAt, launch_.v, panel, rank);
    }
#pragma unroll 1
    for (int panel = 0; panel < kOtherKeyPanels; ++panel) {
      const int own = rank * Tiling::kGradQPanels;
      load(panel * Tiling::kPanelBytes + Tiling::kOtherKeysAt, launch_.k, own + panel, 1 - rank);
    }
  }

  // One warp finds the tiles of rows that see the keys of each item. Two counters share a register: of tiles of rows,
  // and in the highest two bits of items.
  DFLASH_INLINE void find_all_rows() {
    constexpr uint32_t kItemTurn = 1u << 30;
    uint32_t turns = 0;
    for (;; turns += kItemTurn) {
      const uint32_t slot = turns / kItemTurn % 2;
      shared_.item_full[slot].wait(turns / kItemTurn / 2);
      const BackwardItem& item = shared_.items[slot];
      if (item.key_tile < 0) break;
      find_rows(item, turns);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared_.item_empty[slot].arrive();
    }
    wait_for_place(turns);
    if (threadIdx.x % 32 == 0) {
      shared_.units[turns % Tiling::kStages].tile = -1;
      shared_.found[turns % Tiling::kStages].arrive();
    }
  }

  DFLASH_INLINE void wait_for_place(uint32_t turns) const {
    shared_.queries_empty[turns % Tiling::kStages].wait(turns / Tiling::kStages % 2 ^ 1);
  }

  // Finds the tiles of rows of one item.
  DFLASH_INLINE void find_rows(const BackwardItem& item, uint32_t& turns) {
    find_seeing_rows<Tiling::kKeys>(p_, item, [&](const SeeingRows& rows, const TileSight& sight) {
      const int group = item.kv_head * launch_.groups_per_head + rows.group;
      int turn = 0;
      if (rows.is_here && p_.is_deterministic) {
        const int index = (item.batch * launch_.groups + group) * static_cast<int>(p_.row_tiles) + rows.tile;
        turn = p_.turns[index * p_.key_tiles + item.key_tile];
      }
      wait_for_place(turns);
      // The lane that holds the tile's entry of the table publishes it.
      if (rows.is_here) {
        shared_.units[turns % Tiling::kStages] = {rows.tile,     group,           item.batch, item.entry,
                                                  sight.is_full, sight.has_empty, turn};
        shared_.found[turns % Tiling::kStages].arrive();
      }
      __syncwarp();
      ++turns;
    });
  }

  // Loads queries, statistics and bounds of the tiles of rows that find_all_rows has found.
  DFLASH_INLINE void load_queries() {
    for (Stage<Tiling::kStages> stage;; stage.advance()) {
      shared_.found[stage.index].wait(stage.parity);
      WideBackwardUnit& unit = shared_.units[stage.index];
      if (unit.tile < 0) return;
      const int positions = Tiling::kRows >> launch_.fold_bits;
      Mbarrier& full = shared_.queries_full[stage.index];
      unit.index = (int64_t(unit.batch) * launch_.groups + unit.group) * p_.row_tiles + unit.tile;
      constexpr uint32_t kStatsBytes = 2 * Tiling::kRows * sizeof(float);
      const uint32_t keys_bytes = positions * sizeof(RowKeys);
      full.arrive_and_expect_tx(Tiling::kTileBytes + kStatsBytes + keys_bytes);
      bulk_load(shared_address(shared_.stats[stage.index]), p_.stats + unit.index * 2 * Tiling::kRows, kStatsBytes,
                full);
      bulk_load(shared_address(shared_.keys[stage.index]),
                p_.keys + (unit.entry * p_.row_tiles + unit.tile) * positions, keys_bytes, full);
      load_rows(Tiling::kQueriesAt + stage.index * Tiling::kTileBytes, launch_.q, unit, full);
    }
  }

  // Loads the outputs' gradients of the same tiles.
  DFLASH_INLINE void load_gradients() {
    for (uint32_t turn = 0;; ++turn) {
      const uint32_t stage = turn % Tiling::kStages;
      shared_.found[stage].wait(turn / Tiling::kStages % 2);
      const WideBackwardUnit& unit = shared_.units[stage];
      if (unit.tile < 0) return;
      shared_.gradients_empty.wait(turn % 2 ^ 1);
      shared_.gradients_full.arrive_and_expect_tx(Tiling::kTileBytes);
      load_rows(Tiling::kGradientsAt, launch_.grad_out, unit, shared_.gradients_full);
    }
  }

  DFLASH_INLINE void load_rows(int at, const CUtensorMap& map, const WideBackwardUnit& unit, Mbarrier& full) const {
    const int head = unit.group << launch_.fold_bits, position = unit.tile * (Tiling::kRows >> launch_.fold_bits);
#pragma unroll 1
    for (int panel = 0; panel < Tiling::kPanels; ++panel) {
      tma_load(memory_ + at + panel * Tiling::kPanelBytes, map,
               Tiling::first_column(cluster_rank()) + panel * kPanelColumns, head, position, unit.batch, full);
    }
  }

  const BackwardParams& p_;
  const BackwardLaunch& launch_;
  Shared& shared_;
  const uint32_t memory_;
};

}  // namespace dflash::DFLASH_ISA::sm90
