// The shapes of Hopper's decode kernel, and what the threads of a block share.
#pragma once

#include "attn/aligned_key_tiles.h"
#include "attn/decode.h"
#include "attn/sm90/cluster_sums.h"
#include "attn/sm90/tile_products.h"
#include "common/mbarrier.h"
#include "common/setmaxnreg.h"

namespace dflash::DFLASH_ISA::sm90 {

// The named barriers of the kernel.
enum DecodeBarrier {
  kDecodeConsumersBarrier = 1,  // all consumers
  kDecodeConsumerBarrier = 2,   // one for each consumer: its own threads
  kStatsBarrier = 4,            // consumers announce statistics to the producer's warp
  kSumsBarrier = 5,             // consumers announce sums to the producer's warp
  kTurnsBarrier = 6,            // consumers hand their sums to the one that has the same rows
};

constexpr int kExactBlocks = 8;  // the number of blocks that share an item in exact mode

// kConsumers warpgroups have rows of their own: 1 where memory is the limit, and 2 where there are enough rows for the
// products to be. kTurns warpgroups have the same rows and take turns at the tiles of keys. A tile's way through one
// warpgroup is long, so that a multiprocessor needs two of them to read as fast as its share of the memory allows: as
// two blocks, or in turns where there are too few items for two blocks.
template <int kDim_, int kConsumers_, int kTurns_ = 1>
struct DecodeTiling {
  static constexpr int kDim = kDim_, kConsumers = kConsumers_, kTurns = kTurns_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = kConsumers == 1 ? 64 : kDim <= 128 ? 128 : 80;
  static constexpr int kStages = kConsumers == 2 ? 2 : (kDim == 64 ? 6 : 3) * kTurns;
  static constexpr int kBlocks = kConsumers * kTurns == 1 && kDim <= 128 ? 2 : 1;  // of a multiprocessor
  static constexpr int kConsumerThreads = kWarpgroup * kConsumers * kTurns;
  static constexpr int kTileThreads = kConsumerThreads / kTurns;  // threads that read a tile of keys
  // setmaxnreg moves registers between whole warpgroups, so a producer of one warp goes without it.
  static constexpr bool kMovesRegisters = kConsumers > 1;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(!kMovesRegisters || registers_suffice(kConsumers, kProducerRegisters, kConsumerRegisters));
  static constexpr int kThreads = kConsumerThreads + (kMovesRegisters ? kWarpgroup : 32);
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  // Shared memory holds the queries, then all stages of keys, then all stages of values.
  static constexpr int kTileBytes = kQueryBytes + 2 * kStages * kKeyBytes;
  static constexpr int kMaxCluster = kConsumers == 1 ? kExactBlocks : 3;
  using Sums = ClusterSums<kRows, kDim / 8, kMaxCluster, kConsumers == 1 ? kDim / 16 : 4, kStatsBarrier, kSumsBarrier>;
  static_assert(Sums::fit(kQueryBytes + kStages * kKeyBytes, kTileBytes));
};

struct DecodeMaps {
  CUtensorMap q, k, v, out;
};

// How items and boxes are numbered.
struct DecodeLayout {
  int fold, positions;  // heads of a position in a tile; positions of one consumer
  int box_keys;
  unsigned kv_heads, tiles, parts;  // tiles of rows; how many of them a tile of the plan has
};

// An item, and which of its key tiles fall to one block of the cluster.
template <int kKeys>
struct DecodeSlice {
  TilePlan plan;
  int batch, kv_head;
  AlignedKeyTiles tiles;
  int begin, end;  // of the visits of `tiles`
  int rank, ranks;
  bool is_dealt;  // in exact mode the parts of kExactKeys keys go round the blocks

  DecodeSlice() = default;
  DFLASH_INLINE DecodeSlice(const TilePlan& plan, int first, int batch, int kv_head, int rank, int ranks, bool exact)
      : plan(plan), batch(batch), kv_head(kv_head), tiles(plan, kKeys, [](int key) { return key / kKeys; }),
        rank(rank), ranks(ranks), is_dealt(exact) {
    this->plan.first = first;
    // The last blocks get one tile less, because the end of the keys is where rows pay for masking.
    begin = (tiles.count * rank + ranks - 1) / ranks;
    end = (tiles.count * (rank + 1) + ranks - 1) / ranks;
    if (exact) {
      end = tiles.count;
      begin = from(0);
    }
  }

  // The block's first visit that is not before visit i.
  DFLASH_INLINE int from(int i) const {
    constexpr int kTiles = kExactKeys / kKeys;  // of a part
    while (is_dealt && i < end) {
      const int tile = tiles[i], part = tile / kTiles, rest = part % kExactBlocks;
      if (rest == rank) break;
      const int to = i + (part + (rank - rest + kExactBlocks) % kExactBlocks) * kTiles - tile;
      i = i < tiles.seam ? min(to, tiles.seam) : to;
    }
    return min(i, end);
  }

  // The first key of a visit.
  DFLASH_INLINE int key(int i) const { return tiles[i] * kKeys; }
};

// What a block's threads share beside queries, keys and values.
template <class Tiling>
struct DecodeShared {
  Ring<Tiling::kStages> k, v;
  Mbarrier q_full;
  typename Tiling::Sums::State sums;
  DecodeSlice<Tiling::kKeys> slice;

  DFLASH_INLINE void init() {
    q_full.init();
    k.init(Tiling::kTileThreads / 32);
    v.init(Tiling::kTileThreads / 32);
    sums.init();
  }
};

// What all threads of a block know.
template <class Tiling>
struct DecodeBlock {
  const DecodeParams& p;
  const DecodeLayout& layout;
  const DecodeMaps& maps;
  DecodeShared<Tiling>& shared;
  unsigned char* memory;  // where the queries begin
  uint32_t queries;       // the same as a shared address
  int rank, ranks;        // the block's rank in the cluster, and how many blocks that has

  DFLASH_INLINE typename Tiling::Sums sums() const { return {memory, shared.sums, rank, ranks}; }
  DFLASH_INLINE uint32_t keys_at(int stage) const { return queries + Tiling::kQueryBytes + stage * Tiling::kKeyBytes; }
  DFLASH_INLINE uint32_t values_at(int stage) const { return keys_at(Tiling::kStages + stage); }
};

}  // namespace dflash::DFLASH_ISA::sm90
