// Decode attention on Hopper, with wgmma and TMA: few rows against a cache.
//
// An item is a tile of rows (positions times the query heads of a key head, 64 rows for each consumer warpgroup) and
// the tiles of keys that the plan says these rows see. A cluster of blocks shares an item; every block takes an equal
// slice of the key tiles (sm90/decode_tiling.h). The block's producer warp streams keys and values through a ring of
// stages (sm90/decode_producer.h), and its consumers keep their sums in registers (sm90/decode_consumer.h). At the end
// every block adds up the columns that fall to it (sm90/cluster_sums.h). Clusters start in the plan's order, longest
// first.
//
// In exact mode an item has as many blocks as a cluster can have, whatever its length and the grid are, and parts of
// kExactKeys keys, which begin at multiples of that number, go round the blocks. So the order in which a row's keys are
// added up depends on their positions alone.
//
// Where the context is constant, the producer fills the stages with it while the previous kernel still runs.
//
// The grid depends on shapes alone, and the work on the plan, so that one captured graph serves all lengths. Tiles of
// keys begin at multiples of their length, so that a page is made of whole boxes.
#include <algorithm>
#include <array>
#include <numeric>

#include "attn/kernels.h"
#include "attn/sm90/boxes.h"
#include "attn/sm90/decode_consumer.h"
#include "attn/sm90/decode_producer.h"
#include "common/dependent_launch.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm90 {
namespace {

template <class T, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    block_attn_decode_sm90(const __grid_constant__ DecodeParams p, const __grid_constant__ DecodeLayout layout,
           const __grid_constant__ DecodeMaps maps) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t queries = uniform(shared_address(memory));
  // Shared memory is addressed through a uniform register, as in the forward.
  auto& shared = *static_cast<DecodeShared<Tiling>*>(__cvta_shared_to_generic(queries + Tiling::kTileBytes));
  const DecodeBlock<Tiling> block{p, layout, maps, shared, memory, queries, cluster_rank(), cluster_size()};
  if (threadIdx.x == 0) {
    // Neighbouring clusters work on one batch entry, so that they share its keys in the L2 cache.
    const unsigned item = blockIdx.x / block.ranks, outer = item / layout.kv_heads, entry = outer / layout.tiles;
    const unsigned tile = outer - entry * layout.tiles, planned = tile / layout.parts;
    const auto* const plan = reinterpret_cast<const TilePlan*>(p.plan) + planned;
    prefetch_l2(plan);
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) prefetch_tensormap(*map);
    shared.init();
    fence_mbarrier_init();
    if (!p.context_is_constant) wait_for_previous_kernel();
    shared.slice = {*plan,
                    plan->first + static_cast<int>(tile - planned * layout.parts) * layout.positions,
                    p.plan_entries > 1 ? plan->entry : static_cast<int>(entry),
                    static_cast<int>(item - outer * layout.kv_heads),
                    block.rank,
                    block.ranks,
                    p.exact};
  }
  __syncthreads();
  const bool has_keys = shared.slice.begin < shared.slice.end;
  if (threadIdx.x >= Tiling::kConsumerThreads) {
    if constexpr (Tiling::kMovesRegisters) setmaxnreg_dec<Tiling::kProducerRegisters>();
    const bool is_producer = threadIdx.x < Tiling::kConsumerThreads + 32;
    DecodeProducer<Tiling> producer{block};
    if (is_producer && has_keys && p.context_is_constant) producer.load_context();
    wait_for_previous_kernel();
    if (is_producer && has_keys) producer.load_the_rest();
    launch_dependents();
    if (is_producer && block.ranks > 1) block.sums().send_all();
  } else {
    if constexpr (Tiling::kMovesRegisters) setmaxnreg_inc<Tiling::kConsumerRegisters>();
    wait_for_previous_kernel();
    DecodeConsumer<T, Tiling> rows{block};
    // A block without keys reads its rows only if no block of the item has keys.
    if (has_keys || shared.slice.tiles.count == 0) rows.read_rows();
    if (shared.slice.begin + rows.turn < shared.slice.end) rows.consume();
    if (Tiling::kTurns > 1 && !rows.join()) return;
    if (block.ranks == 1) {
      rows.finish();
    } else {
      if (Tiling::kTurns > 1 || !has_keys) rows.announce();
      rows.finish_together();
    }
  }
}

// The largest box that divides both a page and a tile.
int64_t box_keys_of(const DecodeParams& p, int64_t keys) {
  return p.pages.table == nullptr ? keys : std::gcd(p.pages.page_size, keys);
}

int64_t tiles_of_rows(const DecodeParams& p, int consumers) {
  const int64_t positions = kDecodeRows / decode_fold(p) * consumers;
  return p.plan_entries * tiles_of(p.q_len, positions * p.plan_parts) * p.plan_parts;
}

int64_t items_of(const DecodeParams& p, int consumers) {
  return tiles_of_rows(p, consumers) * p.kv_heads * (p.plan_entries == 1 ? p.batch : 1);
}

template <class T, class Tiling>
cudaError_t launch_decode(const DecodeParams& p, cudaStream_t stream) {
  const auto kernel = block_attn_decode_sm90<T, Tiling>;
  constexpr int kBytes = Tiling::kTileBytes + sizeof(DecodeShared<Tiling>);
  // The system takes a kilobyte of each block.
  static_assert(Tiling::kBlocks * (kBytes + 1024) <= kMaxSharedBytes + 1024);
  const int64_t fold = decode_fold(p), positions = kDecodeRows / fold;
  const int64_t tiles = tiles_of_rows(p, Tiling::kConsumers), items = items_of(p, Tiling::kConsumers);
  const auto shape_of = [&](int ranks) {
    LaunchShape shape{items * ranks, Tiling::kThreads, kBytes, ranks};
    shape.overlaps_previous = true;
    return shape;
  };

  // As many blocks share an item as there are multiprocessors for, as long as all clusters are resident at once.
  cudaError_t status = allow_shared_memory(kernel, kBytes);
  if (status != cudaSuccess) return status;
  const int processors = multiprocessors_of(stream);
  const auto resident = once_per_device(processors, [&] {
    std::array<int, Tiling::kMaxCluster + 1> clusters{};
    for (int ranks = 2; ranks <= Tiling::kMaxCluster; ++ranks) {
      LaunchShape shape = shape_of(ranks);
      shape.blocks = ranks;
      clusters[ranks] = count_resident_clusters(kernel, shape, stream);
    }
    return clusters;
  });
  const int64_t wanted = std::min({processors / items, p.kv_len / Tiling::kKeys, int64_t(Tiling::kMaxCluster)});
  int ranks = static_cast<int>(std::max<int64_t>(wanted, 1));
  while (ranks > 1 && resident[ranks] < items) --ranks;
  if (p.exact) ranks = Tiling::kMaxCluster;

  const DecodeLayout layout{static_cast<int>(fold),
                            static_cast<int>(positions),
                            static_cast<int>(box_keys_of(p, Tiling::kKeys)),
                            static_cast<unsigned>(p.kv_heads),
                            static_cast<unsigned>(tiles),
                            static_cast<unsigned>(p.plan_parts)};
  DecodeMaps maps;
  status = make_tensor_maps(p.dtype, {{&maps.q, query_box(p, p.q, p.q_strides, fold)},
                                      {&maps.out, query_box(p, p.out, p.out_strides, fold)},
                                      {&maps.k, key_box(p, p.k, p.k_strides, layout.box_keys)},
                                      {&maps.v, key_box(p, p.v, p.v_strides, layout.box_keys)}});
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel, shape_of(ranks), stream, p, layout, maps);
}

// Whether two consumers of a block take turns. They do where a multiprocessor has one block, and that block has enough
// tiles to make up for the addition of their sums. This changes the order of a row's sums, so exact mode never does it.
bool takes_turns(const DecodeParams& p, int64_t processors) {
  constexpr int64_t kLeastKeys = 512;
  const int64_t items = items_of(p, 1);
  if (p.exact || items > processors) return false;
  return p.kv_len >= kLeastKeys * std::min<int64_t>(processors / items, kExactBlocks);
}

template <class T>
cudaError_t launch_decode(DecodeParams p, cudaStream_t stream) {
  const int64_t processors = multiprocessors_of(stream);
  bool is_wide = decode_warpgroups(p, p.exact) == 2;
  if (is_wide) {
    // Few blocks share a wide tile, so that few wide tiles leave most multiprocessors idle. Halves of them, each shared
    // by as many blocks or more, take half the time.
    DecodeParams halves = p;
    halves.plan_parts *= 2;
    is_wide = processors / items_of(halves, 1) < DecodeTiling<128, 2>::kMaxCluster;
    if (!is_wide) p = halves;
  }
  const bool in_turns = !is_wide && takes_turns(p, processors);
  if (p.head_dim <= 64) {
    return in_turns ? launch_decode<T, DecodeTiling<64, 1, 2>>(p, stream)
                    : launch_decode<T, DecodeTiling<64, 1>>(p, stream);
  }
  if (p.head_dim <= 128) {
    return is_wide    ? launch_decode<T, DecodeTiling<128, 2>>(p, stream)
           : in_turns ? launch_decode<T, DecodeTiling<128, 1, 2>>(p, stream)
                      : launch_decode<T, DecodeTiling<128, 1>>(p, stream);
  }
  return is_wide ? launch_decode<T, DecodeTiling<256, 2>>(p, stream)
                 : launch_decode<T, DecodeTiling<256, 1>>(p, stream);
}

}  // namespace
}  // namespace device::sm90

uint32_t decode_sm90_misses(const DecodeParams& p) {
  if (!hopper_kernels_serve() || p.kv_len == 0) return kNoSuchKernel;
  return (p.head_dim > kMostDecodeDim ? kDecodeHeadDim : 0) |
         (decode_head_tiles(p) > 1 ? kDecodeHeads : 0) |
         (p.pages.table != nullptr && p.pages.page_size % 16 != 0 ? kDecodePages : 0) |
         (copy_engine_serves(p) ? 0 : kDecodeLayout);
}

const char* decode_sm90(const DecodeParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::sm90::launch_decode<T>(p, stream);
  });
}

}  // namespace dflash
