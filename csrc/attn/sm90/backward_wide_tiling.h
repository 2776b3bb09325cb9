// The shapes of the Hopper backward for head dimensions above 128, and what the warpgroups of a block share.
#pragma once

#include "attn/scores.h"
#include "attn/sm90/backward_tiling.h"
#include "common/cluster.h"

namespace dflash::DFLASH_ISA::sm90 {

// A cluster of two blocks works on a tile of keys, and each block sums gradients of 64 keys and 256 columns. Up to head
// dimension 256 a block owns half of the keys, with all columns of them. Above it owns half of the columns of all keys.
template <int kDim_>
struct WideBackwardTiling {
  static constexpr int kDim = kDim_, kBlocks = static_cast<int>(hopper_backward_cluster(kDim));
  static constexpr int kConsumers = 3, kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr bool kSplitsColumns = kDim > 256;
  static constexpr int kRows = static_cast<int>(hopper_backward_rows(kDim)), kConsumerKeys = 64;
  static constexpr int kKeys = static_cast<int>(hopper_backward_keys(kDim));
  static_assert(kKeys == (kSplitsColumns ? kConsumerKeys : kBlocks * kConsumerKeys));
  static constexpr int kColumns = 256;  // of keys, values and rows that a block holds
  static constexpr int kStages = 2;     // of queries; there is one buffer of outputs' gradients
  // Two consumers hold sums of 64 keys and 256 columns, and the third has 64 columns of dQ at a time.
  static constexpr int kProducerRegisters = 24, kKeyRegisters = 208, kQueryRegisters = 72;
  static_assert(kProducerRegisters + 2 * kKeyRegisters + kQueryRegisters <=
                (1 + kConsumers) * registers_at_launch(kThreads));

  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr int kGradQPanels = kDim / kBlocks / kPanelColumns;  // of dQ, the block's own
  static constexpr int kPanelBytes = kConsumerKeys * kPanelRowBytes;   // of 64 keys or 64 rows
  static_assert(kRows == kConsumerKeys);
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kScoreBytes = kRows * kConsumerKeys * 2;

  // Dynamic shared memory, with room to align it to 1024 bytes: keys, values, queries, outputs' gradients,
  // probabilities in float32, dS of the block's keys, and what comes from the other block:
  // - if blocks split keys, its keys, in the columns of dQ that this block computes, and its dS;
  // - if blocks split columns, the sums of its columns to S and dP, in float32.
  static constexpr int kValuesAt = kTileBytes, kQueriesAt = 2 * kTileBytes;
  static constexpr int kGradientsAt = kQueriesAt + kStages * kTileBytes;
  static constexpr int kProbabilitiesAt = kGradientsAt + kTileBytes;
  static constexpr int kScoresAt = kProbabilitiesAt + 2 * kScoreBytes;
  static constexpr int kOtherAt = kScoresAt + kScoreBytes;
  static constexpr int kOtherKeysAt = kOtherAt + kScoreBytes;
  static constexpr int kOtherBytes = kSplitsColumns ? 4 * kScoreBytes : kScoreBytes + kGradQPanels * kPanelBytes;
  static constexpr int kBytes = kOtherAt + kOtherBytes + 1024;

  // Where a block's keys and columns begin.
  static DFLASH_INLINE int first_key(const BackwardItem& item, int rank) {
    return item.key_tile * kKeys + (kSplitsColumns ? 0 : rank * kConsumerKeys);
  }
  static DFLASH_INLINE int first_column(int rank) { return kSplitsColumns ? rank * kColumns : 0; }
};

// The named barriers of the kernel. "Written" and "read" are said of the one buffer that two consumers share.
enum WideBackwardBarrier {
  kKeysAreRead = 1,           // all consumers
  kProbabilitiesWritten = 2,  // the consumers of values and of keys
  kProbabilitiesRead = 3,
  kRowsCleared = 4,
  kOwnThreads = 5,    // one for each of these two
  kQueryThreads = 7,  // the consumer of queries
};

// A tile of rows in a stage.
struct WideBackwardUnit {
  int tile, group, batch, entry;  // tile is -1 when there are no more; the head group is one of all heads
  bool is_full, has_empty;
  int turn;       // of the addition to its dQ
  int64_t index;  // among the tiles of all head groups and batch entries
};

template <class Tiling>
struct WideBackwardShared {
  static constexpr int kStages = Tiling::kStages;
  alignas(128) float stats[kStages][2][Tiling::kRows];  // LSEs, then deltas
  alignas(16) RowKeys keys[kStages][Tiling::kRows];     // of positions
  WideBackwardUnit units[kStages];
  BackwardItem items[2];  // of this turn and the next
  Scores scores;          // for softcap
  Mbarrier item_full[2], item_empty[2], kv_full, kv_empty;
  Mbarrier found[kStages], queries_full[kStages], queries_empty[kStages];
  Mbarrier gradients_full, gradients_empty;
  Mbarrier scores_full, scores_empty;
  Mbarrier other_full[2], other_empty[2];  // the other block's S and dP

  DFLASH_INLINE void init(const BackwardParams& p) {
    scores = Scores(p);
    constexpr int kWarps = 4;  // of a consumer
    kv_full.init();
    kv_empty.init(Tiling::kConsumers);
    for (int i = 0; i < kStages; ++i) {
      found[i].init();
      queries_full[i].init();
      queries_empty[i].init(Tiling::kConsumers * kWarps);
    }
    gradients_full.init();
    gradients_empty.init(2 * kWarps);  // the consumers of values and of keys
    scores_full.init();
    scores_empty.init(Tiling::kSplitsColumns ? kWarps : Tiling::kBlocks * kWarps);  // those that compute dQ of them
    for (int i = 0; i < 2; ++i) {
      item_full[i].init();
      item_empty[i].init();
      other_full[i].init(kWarps);
      other_empty[i].init(kWarps);
    }
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
