// The producer of the Hopper backward. Its four warps share the work, because each thread has only 24 registers.
#pragma once

#include "attn/sm90/backward_tiling.h"
#include "attn/sm90/seeing_rows.h"
#include "attn/sm90/turns.h"

namespace dflash::DFLASH_ISA::sm90 {

template <class Tiling>
class BackwardProducer {
 public:
  DFLASH_INLINE BackwardProducer(const BackwardParams& p, const BackwardLaunch& launch,
                                 BackwardShared<Tiling>& shared, uint32_t memory)
      : p_(p), launch_(launch), shared_(shared), memory_(memory) {}

  // One thread walks over the block's items, and starts the loads of their keys and values. The next item is known
  // early, so that its rows arrive while the consumers finish the item before.
  DFLASH_INLINE void load_items() {
    Stage<kItemSlots> slot;
    slot.parity = 1;
    uint32_t parity = 1;
    for (int section = 0; section < static_cast<int>(p_.sections); ++section) {
      const int first = p_.first_items[section * static_cast<int>(p_.blocks) + blockIdx.x];
      if (first < 0) {
        count_up(p_.sections_added + section);
        continue;
      }
      const BackwardItem* next = p_.items + first;
      for (bool goes_on = true; goes_on; ++next) {
        shared_.item_slots.empty[slot.index].wait(slot.parity);
        const BackwardItem& item = shared_.items[slot.index] = *next;
        goes_on = !item.is_last;
        shared_.item_slots.full[slot.index].arrive();
        slot.advance();
#pragma unroll 1
        for (int panel = 0; panel < Tiling::kPanels; ++panel) {
          const int column = panel * kPanelColumns, key = item.key_tile * Tiling::kKeys;
          tma_prefetch(launch_.k, column, key, item.kv_head, item.batch);
          tma_prefetch(launch_.v, column, key, item.kv_head, item.batch);
        }
        shared_.kv_empty.wait(parity);
        parity ^= 1;
        shared_.kv_full.arrive_and_expect_tx(2 * Tiling::kKeyBytes);
#pragma unroll 1
        for (int panel = 0; panel < Tiling::kPanels; ++panel) {
          const uint32_t to = memory_ + panel * Tiling::kKeys * kPanelRowBytes;
          const int column = panel * kPanelColumns, key = item.key_tile * Tiling::kKeys;
          tma_load(to, launch_.k, column, key, item.kv_head, item.batch, shared_.kv_full);
          tma_load(to + Tiling::kValuesAt, launch_.v, column, key, item.kv_head, item.batch, shared_.kv_full);
        }
      }
    }
    shared_.item_slots.empty[slot.index].wait(slot.parity);
    shared_.items[slot.index].key_tile = -1;
    shared_.item_slots.full[slot.index].arrive();
  }

  // One warp finds the tiles of rows that see the keys of each item.
  DFLASH_INLINE void find_all_rows() {
    Stage<Tiling::kStages> stage;
    stage.parity = 1;
    for (Stage<kItemSlots> slot;; slot.advance()) {
      shared_.item_slots.full[slot.index].wait(slot.parity);
      if (shared_.items[slot.index].key_tile < 0) break;
      find_rows(slot.index, stage);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared_.item_slots.empty[slot.index].arrive();
    }
    shared_.rows.empty[stage.index].wait(stage.parity);
    if (threadIdx.x % 32 == 0) {
      shared_.units[stage.index].tile = -1;
      shared_.found[stage.index].arrive();
    }
  }

  // One thread starts the loads of the tiles that find_all_rows has found.
  DFLASH_INLINE void load_rows() {
    for (Stage<Tiling::kStages> stage;; stage.advance()) {
      shared_.found[stage.index].wait(stage.parity);
      const BackwardUnit& unit = shared_.units[stage.index];
      if (unit.tile < 0) return;
      const BackwardItem& item = shared_.items[unit.slot];
      const int group = item.kv_head * launch_.groups_per_head + unit.group;
      const int positions = Tiling::kRows >> launch_.fold_bits;
      Mbarrier& full = shared_.rows.full[stage.index];
      const int64_t index = unit.index;
      constexpr uint32_t kStatsBytes = 2 * Tiling::kRows * sizeof(float);
      const uint32_t keys_bytes = positions * sizeof(RowKeys);
      full.arrive_and_expect_tx(2 * Tiling::kRowBytes + kStatsBytes + keys_bytes);
      bulk_load(shared_address(shared_.stats[stage.index]), p_.stats + index * 2 * Tiling::kRows, kStatsBytes, full);
      bulk_load(shared_address(shared_.keys[stage.index]),
                p_.keys + (item.entry * p_.row_tiles + unit.tile) * positions, keys_bytes, full);
      const uint32_t rows = memory_ + Tiling::kRowsAt + stage.index * 2 * Tiling::kRowBytes;
#pragma unroll 1
      for (int panel = 0; panel < Tiling::kPanels; ++panel) {
        const uint32_t to = rows + panel * Tiling::kRows * kPanelRowBytes;
        const int column = panel * kPanelColumns, head = group << launch_.fold_bits, position = unit.tile * positions;
#pragma unroll
        for (int row = 0; row < Tiling::kRows; row += 64) {
          const int at = to + row * kPanelRowBytes, first = position + (row >> launch_.fold_bits);
          tma_load(at, launch_.q, column, head, first, item.batch, full);
          tma_load(at + Tiling::kRowBytes, launch_.grad_out, column, head, first, item.batch, full);
        }
      }
    }
  }

  // One thread adds the consumers' dQ of each tile of rows to the sums in global memory. The copy engine adds it: after
  // additions by the consumers' own threads, their next fence would wait until memory has them.
  DFLASH_INLINE void add_grad_q() {
    constexpr int kFloats = Tiling::kRows * Tiling::kDim;
    uint32_t parity = 0;
    for (Stage<Tiling::kStages> stage;; stage.advance(), parity ^= 1) {
      shared_.found[stage.index].wait(stage.parity);
      const BackwardUnit& unit = shared_.units[stage.index];
      if (unit.tile < 0) return;
      const int64_t index = unit.index;
      const int turn = unit.turn;
      const bool ends_item = unit.ends_item;
      shared_.rows.empty[stage.index].arrive();  // the unit has been read
      int32_t* const added = p_.rows_added + index;
      if (p_.is_deterministic) wait_for_turn(added, turn);
      shared_.grad_q_full.wait(parity);
      const bool is_first = p_.is_deterministic ? turn == 0 : claims_first(added);
      put_sums<kFloats>(p_.grad_q_sums + index * kFloats, memory_ + Tiling::kGradQAt, is_first);
      // When consumers end an item, all of its additions have reached memory.
      if (ends_item) {
        bulk_wait_group<0>();
      } else {
        bulk_wait_group_read<0>();
      }
      shared_.grad_q_empty.arrive();
      if (p_.is_deterministic || is_first) end_turn(added);
    }
  }

 private:
  // Finds the tiles of rows of one item.
  DFLASH_INLINE void find_rows(int slot, Stage<Tiling::kStages>& stage) {
    const BackwardItem& item = shared_.items[slot];
    find_seeing_rows<Tiling::kKeys>(p_, item, [&](const SeeingRows& rows, const TileSight& sight) {
      // All tiles of rows can be counted in 32 bits: there is no memory for more.
      const int head_group = item.batch * launch_.groups + item.kv_head * launch_.groups_per_head + rows.group;
      const int index = head_group * static_cast<int>(p_.row_tiles) + rows.tile;
      const int turn = rows.is_here && p_.is_deterministic ? p_.turns[index * p_.key_tiles + item.key_tile] : 0;
      shared_.rows.empty[stage.index].wait(stage.parity);
      // The lane that holds the tile's entry of the table publishes it.
      if (rows.is_here) {
        shared_.units[stage.index] = BackwardUnit{rows.tile,     rows.group,      slot,         turn,
                                                  sight.is_full, sight.has_empty, rows.is_last, index};
        shared_.found[stage.index].arrive();
      }
      __syncwarp();
      stage.advance();
    });
  }

  const BackwardParams& p_;
  const BackwardLaunch& launch_;
  BackwardShared<Tiling>& shared_;
  const uint32_t memory_;
};

}  // namespace dflash::DFLASH_ISA::sm90
