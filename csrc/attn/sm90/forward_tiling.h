// The shapes of the Hopper forward, and what its warpgroups share.
#pragma once

#include "attn/sm90/packed_key_tiles.h"
#include "attn/sm90/schedule.h"
#include "attn/sm90/tile_products.h"
#include "common/launch.h"
#include "common/mbarrier.h"
#include "common/setmaxnreg.h"

namespace dflash::DFLASH_ISA::sm90 {

template <int kDim>
struct ForwardTiling {
  static constexpr int kRows = static_cast<int>(hopper_tile_rows(kDim));
  static constexpr int kKeys = kDim == 128 ? 128 : kDim == 256 ? 80 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : kDim <= 256 ? 2 : 1;
  static constexpr int kQueryStages = kDim <= 128 ? 2 : 1;

  // A consumer is a warpgroup with 64 rows. A tile of 64 rows is shared by two consumers: both make all scores, and
  // each sums half of the output's columns.
  static constexpr bool kSharesRows = kRows == 64;
  static constexpr int kConsumers = kSharesRows ? 2 : kRows / 64;
  static constexpr int kConsumerRows = 64;
  static constexpr int kValueColumns = kSharesRows ? kDim / kConsumers : kDim;  // of one consumer
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 112;
  static_assert(registers_suffice(kConsumers, kProducerRegisters, kConsumerRegisters));

  // With ping-pong, consumers take turns at starting products, so that one's softmax runs beside the other's products.
  static constexpr bool kPingPong = kDim == 128;
  // Without it (and with rows of its own) a consumer does not wait for the others, and skips tiles of keys that none of
  // its own rows sees.
  static constexpr bool kSkipsTiles = !kPingPong && !kSharesRows;

  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kItems = kQueryStages + 1;  // the items whose queries are in shared memory, and the next
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;

  // The output leaves through shared memory: through its own where there is room, otherwise through that of the values.
  static constexpr bool kOwnOutput = kDim <= 128;

  // Dynamic shared memory, with room to align it to 1024 bytes: queries, keys, values, output.
  static constexpr int kKeysAt = kQueryStages * kQueryBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr int kOutputAt = kOwnOutput ? kValuesAt + kStages * kKeyBytes : kValuesAt;
  static constexpr int kBytes = kValuesAt + kStages * kKeyBytes + kOwnOutput * kQueryBytes + 1024;
};

// The named barriers of the kernel.
enum ForwardBarrier {
  kTurnBarrier = 1,       // one for each consumer under ping-pong: it may start its products
  kConsumerBarrier = 3,   // one for each consumer: its own threads
  kConsumersBarrier = 7,  // all consumers
};

struct ForwardMaps {
  CUtensorMap q, k, v, out;
  CUtensorMap k_granule, v_granule;  // boxes of kGranule keys, for tiles with a seam
};

struct alignas(16) ForwardItem {
  TilePlan plan;
  int batch, first_head;
};

// What the warpgroups share beside queries, keys, values and output.
template <class Tiling>
struct ForwardShared {
  ForwardItem items[Tiling::kItems];
  Mbarrier item_full[Tiling::kItems];
  Mbarrier out_empty;
  Ring<Tiling::kQueryStages> q;
  Ring<Tiling::kStages> k, v;

  DFLASH_INLINE void init() {
    for (Mbarrier& full : item_full) full.init();
    out_empty.init(Tiling::kConsumers);
    q.init(Tiling::kConsumers * 4);
    k.init(Tiling::kConsumers * 4);
    v.init(Tiling::kConsumers * 4);
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
