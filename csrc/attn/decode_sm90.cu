// Decode attention on Hopper: few rows against a cache.
//
// A cluster of blocks shares an item: a tile of rows (positions times the query heads of a key head, 64 for each of the
// block's consumer warpgroups) and the tiles of keys that the plan says they see. Every block takes an equal part of
// the key tiles. Its producer warp has the copy engine stream keys and values through a ring; its consumers keep the
// sums in registers. At the end a block sends its sums to the others over the cluster, each of which brings together
// the columns that fall to it. Clusters start in the plan's order, longest first.
//
// The grid follows from shapes alone, what there is to do from the plan: one captured graph serves all lengths. Tiles
// of keys begin at multiples of their length, so that a page is made of whole boxes.
#include <algorithm>
#include <array>
#include <numeric>

#include "attn/boxes.h"
#include "attn/decode.h"
#include "attn/kernels.h"
#include "attn/not_finite.h"
#include "attn/tile_products.h"
#include "common/gpu.h"
#include "common/hopper.h"

namespace dflash {
namespace device {
namespace {

// One consumer where memory is what takes time, two where there are enough rows for the products to.
template <int kDim_, int kConsumers_>
struct DecodeTiling {
  static constexpr int kDim = kDim_, kConsumers = kConsumers_;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = kConsumers == 1 ? 64 : kDim <= 128 ? 128 : 80;
  static constexpr int kStages = kConsumers == 2 ? 2 : kDim == 64 ? 6 : 3;
  static constexpr int kBlocks = kConsumers == 1 && kDim <= 128 ? 2 : 1;  // on a multiprocessor
  static constexpr int kConsumerThreads = 128 * kConsumers;
  // Registers are moved between whole warpgroups only.
  static constexpr bool kMovesRegisters = kConsumers > 1;
  static constexpr int kThreads = kConsumerThreads + (kMovesRegisters ? 128 : 32);
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kTileBytes = kQueryBytes + kStages * kStageBytes;
  // What the blocks send each other lies where queries, keys and values were: a block's own sums, as fragments of eight
  // columns, what it is sent of them, and the statistics of all blocks.
  static constexpr int kMaxCluster = kConsumers == 1 ? 8 : 3;
  static constexpr int kFragments = kDim / 8;
  static constexpr int kFragmentBytes = kRows * 8 * sizeof(float), kStatsBytes = kRows * sizeof(float2);
  static constexpr int parts_bytes(int ranks) {
    return (kFragments + (ranks - 1) * ((kFragments + ranks - 1) / ranks)) * kFragmentBytes + ranks * kStatsBytes;
  }
  static constexpr bool parts_fit() {
    for (int ranks = 2; ranks <= kMaxCluster; ++ranks) {
      if (parts_bytes(ranks) > kTileBytes) return false;
    }
    return true;
  }
};

struct DecodeMaps {
  CUtensorMap q, k, v, out;
};

// How items and boxes are numbered.
struct DecodeLayout {
  int fold, positions;  // heads of a position in a tile; positions of one consumer
  int box_keys;
  unsigned kv_heads, tiles;  // tiles of the plan
  int own_fragments;         // that a block finishes; the last may have fewer
};

// The keys of the plan's two runs, as tiles at multiples of kKeys: tile i of `count` is the (first + i)-th, or from the
// seam on the (first + jump + i)-th. No tile is in both runs.
template <int kKeys>
struct KeySpan {
  int first, seam, jump, count;

  KeySpan() = default;
  DFLASH_INLINE explicit KeySpan(const TilePlan& plan) {
    const auto end_of = [&](int run) { return plan.lo[run] < plan.hi[run] ? (plan.hi[run] + kKeys - 1) / kKeys : 0; };
    first = plan.lo[0] / kKeys;
    seam = max(end_of(0) - first, 0);
    const int second = max(plan.lo[1] / kKeys, first + seam);
    jump = second - first - seam;
    count = seam + max(end_of(1) - second, 0);
  }
  DFLASH_INLINE int key(int i) const { return (first + i + (i < seam ? 0 : jump)) * kKeys; }
};

// A block's part of an item.
template <int kKeys>
struct DecodeShare {
  TilePlan plan;
  int batch, kv_head;
  KeySpan<kKeys> span;
  int begin, end;  // of the span

  DecodeShare() = default;
  DFLASH_INLINE DecodeShare(const TilePlan& plan, int batch, int kv_head, unsigned rank, unsigned ranks)
      : plan(plan), batch(batch), kv_head(kv_head), span(plan) {
    // Whoever has one tile less has the end, where not all rows see all keys.
    begin = (span.count * rank + ranks - 1) / ranks;
    end = (span.count * (rank + 1) + ranks - 1) / ranks;
  }
};

// What a block's threads share beside queries, keys and values.
template <class Tiling>
struct DecodeShared {
  Ring<Tiling::kStages> k, v;
  Barrier q_full, parts_full;
  DecodeShare<Tiling::kKeys> share;
};

// What all threads of a block know.
template <class Tiling>
struct DecodeBlock {
  const DecodeParams& p;
  const DecodeLayout& layout;
  const DecodeMaps& maps;
  DecodeShared<Tiling>& shared;
  unsigned char* memory;   // all of the shared memory
  uint32_t queries, ring;  // in it
  unsigned rank, ranks;    // its place in the cluster, and how many blocks that has

  DFLASH_INLINE uint32_t keys_at(int stage) const { return ring + stage * Tiling::kStageBytes; }
  DFLASH_INLINE uint32_t values_at(int stage) const { return keys_at(stage) + Tiling::kKeyBytes; }
};

// The warp that has the copy engine bring tiles. Lane i brings the i-th box of each: a panel of a page's keys, or of
// the whole tile's.
template <class Tiling>
struct DecodeProducer {
  const DecodeBlock<Tiling>& block;
  const DecodeShare<Tiling::kKeys>& share = block.shared.share;
  const int lane = threadIdx.x % 32, panel = lane % Tiling::kPanels;
  const int key = lane / Tiling::kPanels * block.layout.box_keys;  // of the tile
  const bool has_box = key < Tiling::kKeys;
  Stage<Tiling::kStages> stage{0, 1};

  DFLASH_INLINE void bring_queries() {
    const DecodeLayout& layout = block.layout;
    Barrier& full = block.shared.q_full;
    if (lane == 0) full.expect(Tiling::kConsumers * Tiling::kPanels * layout.fold * layout.positions * kPanelRowBytes);
    __syncwarp();
    if (lane < Tiling::kConsumers * Tiling::kPanels) {
      const int consumer = lane / Tiling::kPanels;
      full.copy(block.queries + lane * kQueryPanelBytes, block.maps.q, panel * kPanelColumns,
                share.kv_head * layout.fold, share.plan.first + consumer * layout.positions, share.batch);
    }
  }

  // Where the lane's box of tile i lies: the page or batch entry, and the row in it. An entry of the table that is no
  // page lies outside the tensor, and what is read there is zeros.
  DFLASH_INLINE int2 locate(int i) const {
    const Pages& pages = block.p.pages;
    const int at = share.span.key(i) + key;
    if (pages.table == nullptr) return {share.batch, at};
    const int size = static_cast<int>(pages.page_size), page = at / size;
    const bool is_seen = has_box && i < share.end && at < max(share.plan.hi[0], share.plan.hi[1]);
    const bool exists = is_seen && page < pages.max_pages;
    return {exists ? pages.table[share.batch * pages.max_pages + page] : -1, at - page * size};
  }

  DFLASH_INLINE void bring(Ring<Tiling::kStages>& into, const CUtensorMap& map, uint32_t to, int2 from) const {
    into.empty[stage.index].wait(stage.parity);
    if (lane == 0) into.full[stage.index].expect(Tiling::kKeyBytes);
    __syncwarp();
    to += panel * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
    if (has_box) into.full[stage.index].copy(to, map, panel * kPanelColumns, from.y, share.kv_head, from.x);
  }

  DFLASH_INLINE void run() {
    bring_queries();
    int2 next = locate(share.begin);
    for (int i = share.begin; i < share.end; ++i, stage.advance()) {
      const int2 from = next;
      next = locate(i + 1);
      bring(block.shared.k, block.maps.k, block.keys_at(stage.index), from);
      bring(block.shared.v, block.maps.v, block.values_at(stage.index), from);
    }
  }
};

// A consumer's 64 rows of one item: their sums over the block's part of the keys.
template <class T, class Tiling>
struct RowSums {
  static constexpr int kKeys = Tiling::kKeys, kDim = Tiling::kDim, kRows = Tiling::kRows;
  static constexpr int kFragments = Tiling::kFragments;
  using Products = TileProducts<T, kKeys, kDim, kDim>;

  // A row's position, -1 if it does not exist, and its query head.
  struct Place {
    int position, head;
  };

  const DecodeBlock<Tiling>& block;
  const DecodeShare<kKeys>& share = block.shared.share;
  // The thread's rows are `row` and the one 8 below.
  const int consumer = uniform(threadIdx.x / 128), row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const Scores scores{block.p};
  float out[kDim / 2] = {};
  OnlineSoftmax softmax;

  DFLASH_INLINE Place place(int r) const {
    const DecodeLayout& layout = block.layout;
    const int within = (row + 8 * r) / layout.fold, at = share.plan.first + consumer * layout.positions + within;
    return {within < layout.positions && at < block.p.q_len ? at : -1,
            share.kv_head * layout.fold + row + 8 * r - within * layout.fold};
  }

  // All rows see all keys of tile i.
  DFLASH_INLINE bool is_full(int i) const {
    const int key = share.span.key(i);
    const auto within = [&](int run) {
      return key >= share.plan.full_lo[run] && key + kKeys <= share.plan.full_hi[run];
    };
    return within(0) || within(1);
  }

  DFLASH_INLINE void consume() {
    auto& shared = block.shared;
    const uint32_t queries = block.queries + consumer * Tiling::kPanels * kQueryPanelBytes;
    RowBounds bounds[2];
    float s[kKeys / 2], correction[2];
    typename Products::Weights weights;
    Stage<Tiling::kStages> k_stage, v_stage;
    bool was_full = true;
    const auto release = [](auto& ring, auto& stage) {
      if (threadIdx.x % 32 == 0) ring.empty[stage.index].arrive();
      stage.advance();
    };
    const auto start_scores = [&] {
      shared.k.full[k_stage.index].wait(k_stage.parity);
      Products::start_scores(s, queries, block.keys_at(k_stage.index));
    };
    const auto start_output = [&](int i) {
      const uint32_t values = block.values_at(v_stage.index);
      shared.v.full[v_stage.index].wait(v_stage.parity);
      if (!was_full) {
        const auto pair_at = [&](int key, int fragment) {
          const uint32_t of_row = values + fragment / 8 * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
          return of_row + (fragment % 8 ^ key % 8) * 16 + threadIdx.x % 4 * 4;
        };
        if (set_aside<T, kKeys, Tiling::kConsumerThreads>(values, Tiling::kKeyBytes, share.span.key(i), bounds, out,
                                                          kConsumersBarrier, pair_at)) {
          fence_shared_writes();
          named_barrier_wait(kConsumersBarrier, Tiling::kConsumerThreads);
        }
      }
      Products::start_output(out, weights, values);
    };
    const auto add = [&](int i) {
      scores(s);
      was_full = is_full(i);
      if (!was_full) hide(s, bounds, share.span.key(i));
      softmax.add(s, scores.factor, correction);
    };

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = place(r).position;
      if (position >= 0) bounds[r] = RowBounds(block.p.mask, share.batch, position, static_cast<int>(block.p.kv_len));
    }
    shared.q_full.wait(0);
    start_scores();
    wait_for_products<0>();
    release(shared.k, k_stage);
    pin(s);
    add(share.begin);
    Products::round_weights(weights, s);
    for (int i = share.begin + 1; i < share.end; ++i) {
      start_scores();
      start_output(i - 1);
      wait_for_products<1>();
      release(shared.k, k_stage);
      pin(s);
      add(i);
      Products::finish_softmax(softmax, s, queries);
      wait_for_products<0>();
      release(shared.v, v_stage);
      pin(out);
      Products::rescale(out, correction);
      Products::round_weights(weights, s);
    }
    start_output(share.end - 1);
    wait_for_products<0>();
    pin(out);
  }

  // Of a row's four threads together.
  DFLASH_INLINE float total(int r) const {
    const float pair = softmax.sum[r] + __shfl_xor_sync(~0u, softmax.sum[r], 1);
    return pair + __shfl_xor_sync(~0u, pair, 2);
  }

  // The end of an item that the block had for itself. The results leave from where the queries were.
  DFLASH_INLINE void finish() const {
    const float sums[2] = {total(0), total(1)}, inverse[2] = {inverse_of(sums[0]), inverse_of(sums[1])};
    const uint32_t rows = block.queries + consumer * Tiling::kPanels * kQueryPanelBytes;
    named_barrier_wait(kOwnBarrier + consumer, 128);
    Products::write_rows(rows, out, inverse);
    named_barrier_wait(kOwnBarrier + consumer, 128);
    if (threadIdx.x % 128 != 0) return;
    for (int panel = 0; panel < Tiling::kPanels; ++panel) {
      store_box(block.maps.out, rows + panel * kQueryPanelBytes, panel * kPanelColumns,
                share.kv_head * block.layout.fold, share.plan.first + consumer * block.layout.positions, share.batch);
    }
    commit_stores();
    wait_for_stores();
  }

  // The end of an item of the whole cluster. Each block finishes some neighbouring fragments of eight columns: it is
  // sent those of the others, and the statistics of their rows. A fragment lies as its threads hold it.
  DFLASH_INLINE void finish_together() const {
    constexpr int kThreads = Tiling::kConsumerThreads, kMaxCluster = Tiling::kMaxCluster;
    const unsigned rank = block.rank, ranks = block.ranks;
    const int own = block.layout.own_fragments, first = rank * own, count = clamped(kFragments - first, own);
    auto* const sums = reinterpret_cast<float4*>(block.memory);                           // [kFragments][kThreads]
    float4* const parts = sums + kFragments * kThreads;                                   // [ranks - 1][own][kThreads]
    auto* const stats = reinterpret_cast<float2*>(parts + (ranks - 1) * own * kThreads);  // [ranks][kRows]
    const auto part_of = [&](unsigned from, unsigned to) { return parts + (from - (from > to)) * own * kThreads; };
    const uint32_t full = shared_address(&block.shared.parts_full);
    const int own_row = consumer * 64 + row;

    // All consumers are done with queries, keys and values, and nothing is on its way to them.
    named_barrier_wait(kConsumersBarrier, kThreads);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      sums[i * kThreads + threadIdx.x] = make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    }
    const float totals[2] = {total(0), total(1)};
    if (threadIdx.x % 4 == 0) {
      for (int r = 0; r < 2; ++r) stats[rank * kRows + own_row + 8 * r] = make_float2(softmax.largest[r], totals[r]);
    }
    if (threadIdx.x == 0) {
      block.shared.parts_full.expect((ranks - 1) * (Tiling::kStatsBytes + count * Tiling::kFragmentBytes));
    }
    fence_shared_writes();
    // Now the others are, too, and the block's own sums are there.
    cluster_arrive();
    cluster_wait();
    named_barrier_wait(kConsumersBarrier, kThreads);
    if (threadIdx.x % 32 == 0) {
      for (unsigned to = threadIdx.x / 32; to < ranks; to += kThreads / 32) {
        if (to == rank) continue;
        const auto send_to = [&](float* at, const void* from, uint32_t bytes) {
          send(remote_address(shared_address(at), to), shared_address(from), bytes, remote_address(full, to));
        };
        float2* const own_stats = stats + rank * kRows;
        send_to(&own_stats->x, own_stats, Tiling::kStatsBytes);
        const int sent = clamped(kFragments - static_cast<int>(to) * own, own);
        if (sent > 0) send_to(&part_of(rank, to)->x, sums + to * own * kThreads, sent * Tiling::kFragmentBytes);
      }
    }
    __syncwarp();
    const Place places[2] = {place(0), place(1)};
    block.shared.parts_full.wait(0);
    // A block leaves only when what it sent has arrived.
    cluster_arrive();

    // Little code, for it runs once and is fetched while it runs.
    float weights[kMaxCluster][2], scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 of[kMaxCluster];
      float largest = -kInfinity, sum = 0;
#pragma unroll
      for (unsigned from = 0; from < kMaxCluster; ++from) {
        of[from] = make_float2(-kInfinity, 0);
        if (from < ranks) of[from] = stats[from * kRows + own_row + 8 * r];
        largest = fmaxf(largest, of[from].x);
      }
      const float base = largest == -kInfinity ? 0.0f : __fmul_rn(largest, scores.factor);
#pragma unroll
      for (unsigned from = 0; from < kMaxCluster; ++from) {
        weights[from][r] = exp2_of(__fmul_rn(of[from].x, scores.factor) - base);
        sum = fmaf(weights[from][r], of[from].y, sum);
      }
      scale[r] = inverse_of(sum);
    }
    const DecodeParams& p = block.p;
    T* to_row[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to_row[r] = static_cast<T*>(p.out) + share.batch * p.out_strides.batch + places[r].head * p.out_strides.head +
                  places[r].position * p.out_strides.row + first * 8 + threadIdx.x % 4 * 2;
    }
    const int stored = min(count, static_cast<int>(p.head_dim) / 8 - first);
#pragma unroll 1
    for (int i = 0; i < stored; ++i) {
      float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
      for (unsigned from = 0; from < kMaxCluster; ++from) {
        if (from >= ranks) break;
        const float4* const part = from == rank ? sums + first * kThreads : part_of(from, rank);
        const float4 y = part[i * kThreads + threadIdx.x];
        x.x = fmaf(weights[from][0], y.x, x.x);
        x.y = fmaf(weights[from][0], y.y, x.y);
        x.z = fmaf(weights[from][1], y.z, x.z);
        x.w = fmaf(weights[from][1], y.w, x.w);
      }
      const uint32_t rounded[2] = {pack<T>(x.x * scale[0], x.y * scale[0]), pack<T>(x.z * scale[1], x.w * scale[1])};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (places[r].position >= 0) *reinterpret_cast<uint32_t*>(to_row[r] + i * 8) = rounded[r];
      }
    }
    cluster_wait();
  }

  static DFLASH_INLINE int clamped(int x, int high) { return max(min(x, high), 0); }
  static DFLASH_INLINE float inverse_of(float sum) { return sum == 0 ? 0.0f : 1 / sum; }

  // Named barriers: all consumers, a consumer's own threads.
  static constexpr int kConsumersBarrier = 1, kOwnBarrier = 2;
};

template <class T, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    decode(const __grid_constant__ DecodeParams p, const __grid_constant__ DecodeLayout layout,
           const __grid_constant__ DecodeMaps maps) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<DecodeShared<Tiling>*>(memory + Tiling::kTileBytes);
  const uint32_t queries = uniform(shared_address(memory));
  const uint32_t ring = queries + Tiling::kQueryBytes;
  const DecodeBlock<Tiling> block{p, layout, maps, shared, memory, queries, ring, cluster_rank(), cluster_blocks()};
  if (threadIdx.x == 0) {
    // Neighbouring clusters work on the tiles of one batch entry, whose keys they find in the L2 cache.
    const unsigned item = blockIdx.x / block.ranks, outer = item / layout.kv_heads, entry = outer / layout.tiles;
    const auto* const plan = reinterpret_cast<const TilePlan*>(p.plan) + (outer - entry * layout.tiles);
    prefetch(plan);
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) prefetch(*map);
    shared.q_full.init();
    shared.parts_full.init();
    shared.k.init(Tiling::kConsumerThreads / 32);
    shared.v.init(Tiling::kConsumerThreads / 32);
    fence_barriers();
    wait_for_previous_kernel();
    shared.share = {*plan, p.plan_entries > 1 ? plan->entry : static_cast<int>(entry),
                    static_cast<int>(item - outer * layout.kv_heads), block.rank, block.ranks};
  }
  __syncthreads();
  wait_for_previous_kernel();
  const bool has_keys = shared.share.begin < shared.share.end;
  if (threadIdx.x >= Tiling::kConsumerThreads) {
    if constexpr (Tiling::kMovesRegisters) give_registers<24>();
    if (threadIdx.x < Tiling::kConsumerThreads + 32 && has_keys) DecodeProducer<Tiling>{block}.run();
    start_next_kernel();
  } else {
    if constexpr (Tiling::kMovesRegisters) take_registers<240>();
    RowSums<T, Tiling> sums{block};
    if (has_keys) sums.consume();
    if (block.ranks == 1) {
      sums.finish();
    } else {
      sums.finish_together();
    }
  }
}

// Keys of a page and keys of a tile are whole boxes.
int64_t box_keys_of(const DecodeParams& p, int64_t keys) {
  return p.pages.table == nullptr ? keys : std::gcd(p.pages.page_size, keys);
}

template <class T, class Tiling>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  static_assert(Tiling::parts_fit());
  const auto kernel = decode<T, Tiling>;
  constexpr int kBytes = Tiling::kTileBytes + sizeof(DecodeShared<Tiling>);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(Tiling::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  const auto set_clusters = [&](int64_t count, unsigned ranks) {
    config.gridDim = dim3(static_cast<unsigned>(count * ranks));
    attributes[0].val.clusterDim = {ranks, 1, 1};
  };

  // As many blocks share an item as there are multiprocessors for, and not so many that clusters wait for others to
  // end.
  static const auto resident = [&] {
    std::array<int, Tiling::kMaxCluster + 1> clusters{};
    for (unsigned ranks = 2; ranks <= Tiling::kMaxCluster; ++ranks) {
      set_clusters(1, ranks);
      if (cudaOccupancyMaxActiveClusters(&clusters[ranks], kernel, &config) != cudaSuccess) {
        clusters[ranks] = 0;
        cudaGetLastError();  // no such clusters here: nobody else's error
      }
    }
    return clusters;
  }();
  int processors = 0;
  status = count_multiprocessors(&processors);
  if (status != cudaSuccess) return status;
  const int64_t fold = decode_fold(p), positions = kDecodeRows / fold;
  const int64_t tiles = p.plan_entries * tiles_of(p.q_len, positions * Tiling::kConsumers);
  const int64_t items = tiles * p.kv_heads * (p.plan_entries == 1 ? p.batch : 1);
  const int64_t wanted = std::min({processors / items, p.kv_len / Tiling::kKeys, int64_t(Tiling::kMaxCluster)});
  unsigned ranks = static_cast<unsigned>(std::max<int64_t>(wanted, 1));
  while (ranks > 1 && resident[ranks] < items) --ranks;
  set_clusters(items, ranks);

  const DecodeLayout layout{static_cast<int>(fold),
                            static_cast<int>(positions),
                            static_cast<int>(box_keys_of(p, Tiling::kKeys)),
                            static_cast<unsigned>(p.kv_heads),
                            static_cast<unsigned>(tiles),
                            static_cast<int>((Tiling::kFragments + ranks - 1) / ranks)};
  DecodeMaps maps;
  status = make_tensor_maps(p.dtype, {{&maps.q, query_box(p, p.q, p.q_strides, fold)},
                                      {&maps.out, query_box(p, p.out, p.out_strides, fold)},
                                      {&maps.k, key_box(p, p.k, p.k_strides, layout.box_keys)},
                                      {&maps.v, key_box(p, p.v, p.v_strides, layout.box_keys)}});
  if (status != cudaSuccess) return status;
  return cudaLaunchKernelEx(&config, kernel, p, layout, maps);
}

template <class T>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  const bool is_wide = decode_warpgroups(p) == 2;
  if (p.head_dim <= 64) return launch<T, DecodeTiling<64, 1>>(p, stream);
  if (p.head_dim <= 128) {
    return is_wide ? launch<T, DecodeTiling<128, 2>>(p, stream) : launch<T, DecodeTiling<128, 1>>(p, stream);
  }
  return is_wide ? launch<T, DecodeTiling<256, 2>>(p, stream) : launch<T, DecodeTiling<256, 1>>(p, stream);
}

}  // namespace
}  // namespace device

bool decode_sm90_serves(const DecodeParams& p) {
  return forward_sm90_runs_here() && !p.exact && p.kv_len > 0 && decode_warpgroups(p) > 0 &&
         (p.pages.table == nullptr || p.pages.page_size % 16 == 0) && copy_engine_serves(p);
}

const char* decode_sm90(const DecodeParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = p.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16>(p, cuda_stream)
                                                         : device::launch<__half>(p, cuda_stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dflash
