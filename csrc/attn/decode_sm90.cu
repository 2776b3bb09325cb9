// Decode attention on Hopper: few rows against a cache.
//
// A cluster of blocks shares an item: a tile of rows (positions times the query heads of a key head, 64 for each of the
// block's consumer warpgroups) and the tiles of keys that the plan says they see. Every block takes an equal part of
// the key tiles. Its producer warp has the copy engine stream keys and values through a ring; its consumers keep the
// sums in registers. At the end each block brings together the columns that fall to it (cluster_sums.h). Clusters start
// in the plan's order, longest first.
//
// The grid follows from shapes alone, what there is to do from the plan: one captured graph serves all lengths. Tiles
// of keys begin at multiples of their length, so that a page is made of whole boxes.
#include <algorithm>
#include <array>
#include <numeric>

#include "attn/decode.h"
#include "attn/kernels.h"
#include "attn/not_finite.h"
#include "attn/plan_check.h"
#include "attn/sm90/boxes.h"
#include "attn/sm90/cluster_sums.h"
#include "attn/sm90/tile_products.h"
#include "common/dependent_launch.h"
#include "common/launch.h"
#include "common/setmaxnreg.h"

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
  // setmaxnreg moves registers between whole warpgroups, so a producer of one warp goes without it.
  static constexpr bool kMovesRegisters = kConsumers > 1;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(!kMovesRegisters || registers_suffice(kConsumers, kProducerRegisters, kConsumerRegisters));
  static constexpr int kThreads = kConsumerThreads + (kMovesRegisters ? 128 : 32);
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  // Queries, then all keys, then all values.
  static constexpr int kTileBytes = kQueryBytes + 2 * kStages * kKeyBytes;
  static constexpr int kMaxCluster = kConsumers == 1 ? 8 : 3;
  using Sums = ClusterSums<kRows, kDim / 8, kMaxCluster, kConsumers == 1 ? kDim / 16 : 4>;
  static_assert(Sums::fit(kQueryBytes + kStages * kKeyBytes, kTileBytes));
};

struct DecodeMaps {
  CUtensorMap q, k, v, out;
};

// How items and boxes are numbered.
struct DecodeLayout {
  int fold, positions;  // heads of a position in a tile; positions of one consumer
  int box_keys;
  unsigned kv_heads, tiles;  // tiles of the plan
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
  DFLASH_INLINE DecodeShare(const TilePlan& plan, int batch, int kv_head, int rank, int ranks)
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
  Mbarrier q_full;
  typename Tiling::Sums::State sums;
  DecodeShare<Tiling::kKeys> share;
};

// What all threads of a block know.
template <class Tiling>
struct DecodeBlock {
  const DecodeParams& p;
  const DecodeLayout& layout;
  const DecodeMaps& maps;
  DecodeShared<Tiling>& shared;
  unsigned char* memory;  // where the queries begin
  uint32_t queries;
  int rank, ranks;  // its place in the cluster, and how many blocks that has

  DFLASH_INLINE typename Tiling::Sums sums() const { return {memory, shared.sums, rank, ranks}; }
  DFLASH_INLINE uint32_t keys_at(int stage) const { return queries + Tiling::kQueryBytes + stage * Tiling::kKeyBytes; }
  DFLASH_INLINE uint32_t values_at(int stage) const { return keys_at(Tiling::kStages + stage); }
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
    Mbarrier& full = block.shared.q_full;
    const int rows = Tiling::kConsumers * layout.fold * layout.positions;
    if (lane == 0) full.arrive_and_expect_tx(rows * Tiling::kPanels * kPanelRowBytes);
    __syncwarp();
    if (lane < Tiling::kConsumers * Tiling::kPanels) {
      const int consumer = lane / Tiling::kPanels;
      tma_load(block.queries + lane * kQueryPanelBytes, block.maps.q, panel * kPanelColumns,
               share.kv_head * layout.fold, share.plan.first + consumer * layout.positions, share.batch, full);
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
    if (lane == 0) into.full[stage.index].arrive_and_expect_tx(Tiling::kKeyBytes);
    __syncwarp();
    to += panel * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
    if (has_box) tma_load(to, map, panel * kPanelColumns, from.y, share.kv_head, from.x, into.full[stage.index]);
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
  static constexpr int kKeys = Tiling::kKeys, kDim = Tiling::kDim;
  using Products = TileProducts<T, kKeys, kDim, kDim>;

  // A row's position, -1 if it does not exist, and its query head.
  struct Place {
    int position, head;
  };

  // A tile of keys, and whether all rows see all of them.
  struct Tile {
    int key;
    bool is_full;
  };

  const DecodeBlock<Tiling>& block;
  const DecodeShare<kKeys>& share = block.shared.share;
  // The thread's rows are `row` and the one 8 below.
  const int consumer = uniform(threadIdx.x / 128), row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const Scores scores{block.p};
  RowBounds bounds[2];
  float out[kDim / 2] = {};
  OnlineSoftmax softmax;

  // Of one of the consumer's rows.
  DFLASH_INLINE Place place(int row) const {
    const DecodeLayout& layout = block.layout;
    const int within = row / layout.fold, at = share.plan.first + consumer * layout.positions + within;
    return {within < layout.positions && at < block.p.q_len ? at : -1,
            share.kv_head * layout.fold + row - within * layout.fold};
  }

  // Tile i of the span.
  DFLASH_INLINE Tile tile_at(int i) const {
    const int key = share.span.key(i);
    const auto within = [&](int run) {
      return (key >= share.plan.full_lo[run]) & (key + kKeys <= share.plan.full_hi[run]);
    };
    return {key, static_cast<bool>(within(0) | within(1))};
  }

  DFLASH_INLINE void read_rows() {
    const PlanCheck check(share.plan);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = place(row + 8 * r).position;
      if (position < 0) continue;
      bounds[r] = RowBounds(block.p.mask, share.batch, position, static_cast<int>(block.p.kv_len));
      softmax.sum[r] = check.addend(bounds[r]);
    }
  }

  DFLASH_INLINE void consume() {
    auto& shared = block.shared;
    const uint32_t queries = block.queries + consumer * Tiling::kPanels * kQueryPanelBytes;
    float s[kKeys / 2], correction[2];
    typename Products::Weights weights;
    Stage<Tiling::kStages> k_stage, v_stage;
    // Worked out one tile ahead, beside exponentials, as uniform arithmetic has long latencies.
    Tile tile = tile_at(share.begin), next = tile_at(share.begin + 1);
    const auto release = [](auto& ring, auto& stage) {
      if (threadIdx.x % 32 == 0) ring.empty[stage.index].arrive();
      stage.advance();
    };
    const auto start_scores = [&] {
      shared.k.full[k_stage.index].wait(k_stage.parity);
      Products::start_scores(s, queries, block.keys_at(k_stage.index));
    };
    const auto wait_for_values = [&] { shared.v.full[v_stage.index].wait(v_stage.parity); };
    const auto start_output = [&] {
      const uint32_t values = block.values_at(v_stage.index);
      if (!tile.is_full) {
        const auto pair_at = [&](int key, int fragment) {
          const uint32_t of_row = values + fragment / 8 * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
          return of_row + (fragment % 8 ^ key % 8) * 16 + threadIdx.x % 4 * 4;
        };
        if (set_aside<T, kKeys, Tiling::kConsumerThreads>(values, Tiling::kKeyBytes, tile.key, bounds, out,
                                                          kConsumersBarrier, pair_at)) {
          fence_proxy_async();
          named_barrier_sync(kConsumersBarrier, Tiling::kConsumerThreads);
        }
      }
      Products::start_output(out, weights, values);
    };
    const auto add = [&] {
      scores(s);
      if (!tile.is_full) hide(s, bounds, tile.key);
      softmax.add(s, scores.factor, correction);
    };

    shared.q_full.wait(0);
    start_scores();
    wgmma_wait_group<0>();
    release(shared.k, k_stage);
    fence_accumulator(s);
    add();
    Products::round_weights(weights, s);
    for (int i = share.begin + 1; i < share.end; ++i) {
      // Where products are what takes time, both are there by now, and nothing comes between the two.
      if (Tiling::kConsumers > 1) wait_for_values();
      start_scores();
      if (Tiling::kConsumers == 1) wait_for_values();
      start_output();
      tile = next;
      next = tile_at(i + 1);
      wgmma_wait_group<1>();
      release(shared.k, k_stage);
      fence_accumulator(s);
      add();
      Products::finish_softmax(softmax, s, queries);
      wgmma_wait_group<0>();
      release(shared.v, v_stage);
      fence_accumulator(out);
      Products::rescale(out, correction);
      Products::round_weights(weights, s);
    }
    wait_for_values();
    start_output();
    if (block.ranks > 1) block.sums().announce(softmax.largest, softmax.sum);
    wgmma_wait_group<0>();
    fence_accumulator(out);
  }

  // The end of an item that the block has for itself. The results leave from where the queries were.
  DFLASH_INLINE void finish() const {
    const float inverse[2] = {inverse_of(total_of(softmax.sum[0])), inverse_of(total_of(softmax.sum[1]))};
    const uint32_t rows = block.queries + consumer * Tiling::kPanels * kQueryPanelBytes;
    named_barrier_sync(kOwnBarrier + consumer, 128);
    Products::write_rows(rows, out, inverse);
    named_barrier_sync(kOwnBarrier + consumer, 128);
    if (threadIdx.x % 128 != 0) return;
    for (int panel = 0; panel < Tiling::kPanels; ++panel) {
      tma_store(block.maps.out, rows + panel * kQueryPanelBytes, panel * kPanelColumns,
                share.kv_head * block.layout.fold, share.plan.first + consumer * block.layout.positions, share.batch);
    }
    bulk_commit_group();
    bulk_wait_group_read<0>();
  }

  // The end of an item of the whole cluster.
  DFLASH_INLINE void finish_together() const {
    const auto sums = block.sums();
    named_barrier_sync(kConsumersBarrier, Tiling::kConsumerThreads);
    sums.lay_out(out);
    const DecodeParams& p = block.p;
    const Place at = place(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16);
    T* const to = static_cast<T*>(p.out) + share.batch * p.out_strides.batch + at.head * p.out_strides.head +
                  at.position * p.out_strides.row;
    const int columns = at.position < 0 ? 0 : static_cast<int>(p.head_dim);
    sums.add_up(scores.factor, [&](int fragment, const float (&x)[8]) {
      if (fragment * 8 >= columns) return;
      *reinterpret_cast<uint4*>(to + fragment * 8) = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                                                      pack<T>(x[6], x[7])};
    });
  }

  // Named barriers: all consumers, a consumer's own threads. ClusterSums has two more.
  static constexpr int kConsumersBarrier = 1, kOwnBarrier = 2;
};

template <class T, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    block_attn_decode_sm90(const __grid_constant__ DecodeParams p, const __grid_constant__ DecodeLayout layout,
           const __grid_constant__ DecodeMaps maps) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t queries = uniform(shared_address(memory));
  // By an address in a uniform register, as in the forward.
  auto& shared = *static_cast<DecodeShared<Tiling>*>(__cvta_shared_to_generic(queries + Tiling::kTileBytes));
  const DecodeBlock<Tiling> block{p, layout, maps, shared, memory, queries, cluster_rank(), cluster_size()};
  if (threadIdx.x == 0) {
    // Neighbouring clusters work on the tiles of one batch entry, whose keys they find in the L2 cache.
    const unsigned item = blockIdx.x / block.ranks, outer = item / layout.kv_heads, entry = outer / layout.tiles;
    const auto* const plan = reinterpret_cast<const TilePlan*>(p.plan) + (outer - entry * layout.tiles);
    prefetch_l2(plan);
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) prefetch_tensormap(*map);
    shared.q_full.init();
    shared.k.init(Tiling::kConsumerThreads / 32);
    shared.v.init(Tiling::kConsumerThreads / 32);
    shared.sums.init();
    fence_mbarrier_init();
    wait_for_previous_kernel();
    shared.share = {*plan, p.plan_entries > 1 ? plan->entry : static_cast<int>(entry),
                    static_cast<int>(item - outer * layout.kv_heads), block.rank, block.ranks};
  }
  __syncthreads();
  wait_for_previous_kernel();
  const bool has_keys = shared.share.begin < shared.share.end;
  if (threadIdx.x >= Tiling::kConsumerThreads) {
    if constexpr (Tiling::kMovesRegisters) setmaxnreg_dec<Tiling::kProducerRegisters>();
    const bool is_producer = threadIdx.x < Tiling::kConsumerThreads + 32;
    if (is_producer && has_keys) DecodeProducer<Tiling>{block}.run();
    launch_dependents();
    if (is_producer && block.ranks > 1) block.sums().send_all();
  } else {
    if constexpr (Tiling::kMovesRegisters) setmaxnreg_inc<Tiling::kConsumerRegisters>();
    RowSums<T, Tiling> rows{block};
    // A block without keys looks at its rows only where no block of the item has keys.
    if (has_keys || shared.share.span.count == 0) rows.read_rows();
    if (has_keys) rows.consume();
    if (block.ranks == 1) {
      rows.finish();
    } else {
      if (!has_keys) block.sums().announce(rows.softmax.largest, rows.softmax.sum);
      rows.finish_together();
    }
  }
}

// Keys of a page and keys of a tile are whole boxes.
int64_t box_keys_of(const DecodeParams& p, int64_t keys) {
  return p.pages.table == nullptr ? keys : std::gcd(p.pages.page_size, keys);
}

template <class T, class Tiling>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  const auto kernel = block_attn_decode_sm90<T, Tiling>;
  constexpr int kBytes = Tiling::kTileBytes + sizeof(DecodeShared<Tiling>);
  static_assert(Tiling::kBlocks * (kBytes + 1024) <= 228 * 1024);  // a block's own kilobyte is the system's
  const int64_t fold = decode_fold(p), positions = kDecodeRows / fold;
  const int64_t tiles = p.plan_entries * tiles_of(p.q_len, positions * Tiling::kConsumers);
  const int64_t items = tiles * p.kv_heads * (p.plan_entries == 1 ? p.batch : 1);
  const auto shape_of = [&](int ranks) {
    LaunchShape shape{items * ranks, Tiling::kThreads, kBytes, ranks};
    shape.overlaps_previous = true;
    return shape;
  };

  // As many blocks share an item as there are multiprocessors for, and not so many that clusters wait for others to
  // end.
  cudaError_t status = allow_shared_memory(kernel, kBytes);
  if (status != cudaSuccess) return status;
  const int processors = multiprocessors_of(stream);
  const auto resident = once_per_device(processors, [&] {
    std::array<int, Tiling::kMaxCluster + 1> clusters{};
    for (int ranks = 2; ranks <= Tiling::kMaxCluster; ++ranks) {
      LaunchShape shape = shape_of(ranks);
      shape.blocks = ranks;
      // An error says that there are no such clusters here.
      if (cudaOccupancyMaxActiveClusters(&clusters[ranks], kernel, LaunchConfig(shape, stream).get()) != cudaSuccess) {
        clusters[ranks] = 0;
      }
    }
    return clusters;
  });
  const int64_t wanted = std::min({processors / items, p.kv_len / Tiling::kKeys, int64_t(Tiling::kMaxCluster)});
  int ranks = static_cast<int>(std::max<int64_t>(wanted, 1));
  while (ranks > 1 && resident[ranks] < items) --ranks;

  const DecodeLayout layout{static_cast<int>(fold),
                            static_cast<int>(positions),
                            static_cast<int>(box_keys_of(p, Tiling::kKeys)),
                            static_cast<unsigned>(p.kv_heads),
                            static_cast<unsigned>(tiles)};
  DecodeMaps maps;
  status = make_tensor_maps(p.dtype, {{&maps.q, query_box(p, p.q, p.q_strides, fold)},
                                      {&maps.out, query_box(p, p.out, p.out_strides, fold)},
                                      {&maps.k, key_box(p, p.k, p.k_strides, layout.box_keys)},
                                      {&maps.v, key_box(p, p.v, p.v_strides, layout.box_keys)}});
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel, shape_of(ranks), stream, p, layout, maps);
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

uint32_t decode_sm90_misses(const DecodeParams& p) {
  if (!hopper_kernels_serve() || p.kv_len == 0) return kNoSuchKernel;
  return (p.exact ? kDecodeExact : 0) | (p.head_dim > 256 ? kDecodeHeadDim : 0) |
         (decode_head_tiles(p) > 1 ? kDecodeHeads : 0) |
         (p.pages.table != nullptr && p.pages.page_size % 16 != 0 ? kDecodePages : 0) |
         (copy_engine_serves(p) ? 0 : kDecodeLayout);
}

const char* decode_sm90(const DecodeParams& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return checked_launch([&] {
    return p.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16>(p, cuda_stream)
                                       : device::launch<__half>(p, cuda_stream);
  });
}

}  // namespace dflash
