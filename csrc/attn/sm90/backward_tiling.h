// The shapes of the Hopper backward, and what its warpgroups share.
#pragma once

#include "attn/backward.h"
#include "attn/scores.h"
#include "attn/sm90/tile_products.h"
#include "common/launch.h"
#include "common/mbarrier.h"
#include "common/setmaxnreg.h"

namespace dflash::DFLASH_ISA::sm90 {

template <int kDim_>
struct BackwardTiling {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = static_cast<int>(hopper_backward_rows(kDim));
  static constexpr int kKeys = static_cast<int>(hopper_backward_keys(kDim));
  static constexpr int kStages = 2;
  static constexpr int kConsumers = 2, kConsumerKeys = kKeys / kConsumers;
  static constexpr int kPanels = kDim / kPanelColumns;

  // Consumers take the rows 64 at a time. At head_dim 64 there are registers to take dS from them for dK as well.
  static constexpr int kHalves = kRows / 64;
  static constexpr bool kKeysFromRegisters = kDim == 64;

  // The part of dQ that a consumer computes: 64 rows of the tile, and half of the columns if the tile has no more rows.
  static constexpr int kGradQColumns = kRows == 64 ? kDim / 2 : kDim;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(registers_suffice(kConsumers, kProducerRegisters, kConsumerRegisters));

  static constexpr int kKeyBytes = kKeys * kDim * 2;  // of keys, and of values
  static constexpr int kRowBytes = kRows * kDim * 2;  // of queries, and of the outputs' gradients
  static constexpr int kScoreBytes = kKeys * kRows * 2;

  // Dynamic shared memory, with room to align it to 1024 bytes: keys, values, the stages of queries and outputs'
  // gradients, two buffers of dS, and dQ.
  static constexpr int kValuesAt = kKeyBytes, kRowsAt = 2 * kKeyBytes;
  static constexpr int kScoresAt = kRowsAt + kStages * 2 * kRowBytes;
  static constexpr int kGradQAt = kScoresAt + 2 * kScoreBytes;
  static constexpr int kBytes = kGradQAt + kRows * kDim * 4 + 1024;

  // At the end of an item dK and dV leave by way of dS and dQ: 16-bit numbers of both, or float32 sums of one of them.
  static constexpr int kOutputAt = kScoresAt, kOutputBytes = kConsumerKeys * kDim * 4;  // of a consumer
  static_assert(kOutputAt + kConsumers * kOutputBytes <= kBytes - 1024);
};

// The named barriers of the kernel.
enum BackwardBarrier {
  kConsumersBarrier = 1,  // all consumers
  kConsumerBarrier = 2,   // one for each consumer: its own threads
};

// What the host computes for the kernel.
struct BackwardLaunch {
  CUtensorMap q, k, v, grad_out, grad_k, grad_v;
  int fold_bits;
  int groups, groups_per_head;  // head groups in all, and of a key head
  float factor;                 // scores times factor are exponents of 2
  float inverse_cap;            // of exponents of 2
};

// The tile of rows in a stage.
struct BackwardUnit {
  int tile, group;  // tile is -1 when there are no more; the head group is counted from the key head's first
  int slot;         // of its item
  int turn;         // of the addition to its dQ
  bool is_full, has_empty;
  bool ends_item;  // the last one of its item
  int64_t index;   // among the tiles of all head groups
};

constexpr int kItemSlots = 2;

template <class Tiling>
struct BackwardShared {
  alignas(128) float stats[Tiling::kStages][2][Tiling::kRows];  // LSEs, then deltas
  alignas(16) RowKeys keys[Tiling::kStages][Tiling::kRows];     // of positions
  BackwardUnit units[Tiling::kStages];
  BackwardItem items[kItemSlots];  // what consumers work on, and the next one
  int rounded_sections;            // how many sections' dQ the block has taken its part in rounding of
  Scores scores;                   // only under a softcap
  Mbarrier kv_full, kv_empty, grad_q_full, grad_q_empty, found[Tiling::kStages];
  Ring<Tiling::kStages> rows;
  Ring<kItemSlots> item_slots;

  DFLASH_INLINE void init(const BackwardParams& p) {
    scores = Scores(p);
    rounded_sections = 0;
    kv_full.init();
    for (Mbarrier& unit : found) unit.init();
    grad_q_empty.init();
    // Warps of consumers release keys and rows, and hand over dQ. The thread that adds dQ releases rows, too, and the
    // warp that finds rows releases items.
    kv_empty.init(Tiling::kConsumers * 4);
    grad_q_full.init(Tiling::kConsumers * 4);
    rows.init(Tiling::kConsumers * 4 + 1);
    item_slots.init(Tiling::kConsumers + 1);
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
