// Decode attention on Hopper: few rows against a cache.
//
// A cluster of blocks shares an item: a tile of rows (positions times the query heads of a key head, 64 for each of the
// block's consumer warpgroups) and the tiles of keys that the plan says they see. Every block takes an equal part of the
// key tiles. Its producer warp has the copy engine stream keys and values through a ring; its consumers keep the sums in
// registers. At the end a block sends its sums to the others over the cluster, each of which brings together the columns
// that fall to it. Clusters start in the plan's order, longest first.
//
// The grid follows from shapes alone, what there is to do from the plan: one captured graph serves all lengths. Tiles
// of keys begin at multiples of their length, so that a page is made of whole boxes.
#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "attn/boxes.h"
#include "attn/decode.h"
#include "attn/kernels.h"
#include "attn/not_finite.h"
#include "attn/tile_products.h"
#include "common/hopper.h"

namespace dflash {
namespace device {
namespace {

constexpr int kMaxCluster = 8;

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
  static constexpr int kRingBytes = 2 * kStages * kKeyBytes;
  // What the blocks send each other lies where queries, keys and values were: of every row's eight columns four bytes
  // each, and its statistics.
  static constexpr int kFragments = kDim / 8;
  static constexpr int kFragmentBytes = kRows * 8 * sizeof(float), kStatsBytes = kRows * sizeof(float2);
  static_assert((kFragments + kMaxCluster - 1) * kFragmentBytes + kMaxCluster * kStatsBytes <= kQueryBytes + kRingBytes);
};

struct DecodeMaps {
  CUtensorMap q, k, v;
};

// How items and boxes are numbered.
struct DecodeLayout {
  int fold, positions;  // heads of a position in a tile; positions of one consumer
  int box_keys;
  unsigned kv_heads, tiles;  // of the plan
  int own_fragments;         // that a block finishes; the last may have fewer
};

// A tile's keys in the two runs of the plan, as tiles at multiples of kKeys, without one in both.
template <int kKeys>
struct KeySpan {
  int first[2], count[2];

  DFLASH_INLINE explicit KeySpan(const TilePlan& plan) {
    int end = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      first[i] = max(plan.lo[i] / kKeys, end);
      count[i] = plan.lo[i] < plan.hi[i] ? max((plan.hi[i] + kKeys - 1) / kKeys - first[i], 0) : 0;
      if (count[i] > 0) end = first[i] + count[i];
    }
  }
  DFLASH_INLINE int total() const { return count[0] + count[1]; }
  DFLASH_INLINE int key(int i) const { return (i < count[0] ? first[0] + i : first[1] + i - count[0]) * kKeys; }
};

// A block's part of an item.
template <int kKeys>
struct DecodeShare {
  TilePlan plan;
  int batch, kv_head;
  KeySpan<kKeys> span;
  int begin, end;  // of the span

  // Neighbouring blocks work on the tiles of one batch entry, whose keys they find in the L2 cache.
  DFLASH_INLINE DecodeShare(const DecodeParams& p, const DecodeLayout& layout, unsigned item, int rank, int ranks)
      : plan(reinterpret_cast<const TilePlan*>(p.plan)[item / layout.kv_heads % layout.tiles]), span(plan) {
    batch = p.plan_entries > 1 ? plan.entry : item / layout.kv_heads / layout.tiles;
    kv_head = item % layout.kv_heads;
    begin = span.total() * rank / ranks;
    end = span.total() * (rank + 1) / ranks;
  }
};

template <int kStages>
struct DecodeBarriers {
  Barrier q_full, parts_full;
  Ring<kStages> k, v;
};

// Lane i of the producer warp brings the i-th box of every tile: a panel of a page's keys, or of the whole tile's.
template <class Tiling>
DFLASH_INLINE void produce(const DecodeParams& p, const DecodeLayout& layout, const DecodeMaps& maps,
                           const DecodeShare<Tiling::kKeys>& share, DecodeBarriers<Tiling::kStages>& barriers,
                           uint32_t queries, uint32_t ring) {
  const int lane = threadIdx.x % 32, panel = lane % Tiling::kPanels, key = lane / Tiling::kPanels * layout.box_keys;
  const bool has_box = key < Tiling::kKeys;
  const uint32_t place = panel * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
  if (lane == 0) {
    barriers.q_full.expect(Tiling::kConsumers * Tiling::kPanels * layout.fold * layout.positions * kPanelRowBytes);
  }
  __syncwarp();
  if (lane < Tiling::kConsumers * Tiling::kPanels) {
    const int consumer = lane / Tiling::kPanels;
    barriers.q_full.copy(queries + lane * kQueryPanelBytes, maps.q, panel * kPanelColumns, share.kv_head * layout.fold,
                         share.plan.first + consumer * layout.positions, share.batch);
  }
  // Where the lane's box of tile i lies: the page or batch entry, and the row in it. An entry of the table that is no
  // page lies outside the tensor, and what is read there is zeros.
  const int last = max(share.plan.hi[0], share.plan.hi[1]);
  const auto locate = [&](int i) -> int2 {
    const int at = share.span.key(i) + key;
    if (p.pages.table == nullptr) return {share.batch, at};
    const int size = static_cast<int>(p.pages.page_size), page = at / size;
    const bool exists = has_box && i < share.end && at < last && page < p.pages.max_pages;
    return {exists ? p.pages.table[share.batch * p.pages.max_pages + page] : -1, at - page * size};
  };
  Stage<Tiling::kStages> stage{0, 1};
  int2 next = locate(share.begin);
  for (int i = share.begin; i < share.end; ++i, stage.advance()) {
    const int2 here = next;
    next = locate(i + 1);
    const auto bring = [&](Ring<Tiling::kStages>& into, const CUtensorMap& map, uint32_t to) {
      into.empty[stage.index].wait(stage.parity);
      if (lane == 0) into.full[stage.index].expect(Tiling::kKeyBytes);
      __syncwarp();
      if (has_box) into.full[stage.index].copy(to, map, panel * kPanelColumns, here.y, share.kv_head, here.x);
    };
    const uint32_t to = ring + 2 * stage.index * Tiling::kKeyBytes + place;
    bring(barriers.k, maps.k, to);
    bring(barriers.v, maps.v, to + Tiling::kKeyBytes);
  }
}

// A consumer's 64 rows: their sums over the block's part of the keys.
template <class T, class Tiling>
struct RowSums {
  static constexpr int kFragments = Tiling::kFragments;
  using Products = TileProducts<T, Tiling::kKeys, Tiling::kDim, Tiling::kDim>;
  static constexpr int kKeys = Tiling::kKeys, kDim = Tiling::kDim;

  // The thread's rows are `row` and the one 8 below.
  const int consumer = threadIdx.x / 128, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  float out[kDim / 2] = {};
  OnlineSoftmax softmax;
  Scores scores;

  DFLASH_INLINE explicit RowSums(const DecodeParams& p) : scores(p) {}

  // Where one of the thread's rows stands: its position, -1 if it does not exist, and its query head.
  struct Place {
    int position, head;
  };
  DFLASH_INLINE Place place(const DecodeParams& p, const DecodeLayout& layout, const DecodeShare<kKeys>& share,
                            int r) const {
    const int within = (row + 8 * r) / layout.fold, at = share.plan.first + consumer * layout.positions + within;
    return {within < layout.positions && at < p.q_len ? at : -1,
            share.kv_head * layout.fold + row + 8 * r - within * layout.fold};
  }

  DFLASH_INLINE void consume(const DecodeParams& p, const DecodeLayout& layout, const DecodeShare<kKeys>& share,
                             DecodeBarriers<Tiling::kStages>& barriers, uint32_t queries, uint32_t ring) {
    queries += consumer * Tiling::kPanels * kQueryPanelBytes;
    RowBounds bounds[2];
    float s[kKeys / 2], correction[2];
    typename Products::Weights weights;
    Stage<Tiling::kStages> k_stage, v_stage;
    const auto keys_at = [&](int stage) { return ring + 2 * stage * Tiling::kKeyBytes; };
    const auto values_at = [&](int stage) { return keys_at(stage) + Tiling::kKeyBytes; };
    const auto within = [&](int i, const int (&lo)[2], const int (&hi)[2]) {
      const int key = share.span.key(i);
      return (key >= lo[0] && key + kKeys <= hi[0]) || (key >= lo[1] && key + kKeys <= hi[1]);
    };
    const auto release = [](auto& into, auto& stage) {
      if (threadIdx.x % 32 == 0) into.empty[stage.index].arrive();
      stage.advance();
    };
    const auto start_scores = [&] {
      barriers.k.full[k_stage.index].wait(k_stage.parity);
      Products::start_scores(s, queries, keys_at(k_stage.index));
    };
    const auto start_output = [&](int i) {
      barriers.v.full[v_stage.index].wait(v_stage.parity);
      if (!within(i, share.plan.full_lo, share.plan.full_hi)) {
        const uint32_t values = values_at(v_stage.index);
        const auto pair_at = [&](int key, int fragment) {
          const uint32_t of_row = values + fragment / 8 * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
          return of_row + (fragment % 8 ^ key % 8) * 16 + threadIdx.x % 4 * 4;
        };
        if (set_aside<T, kKeys, Tiling::kConsumerThreads>(values, Tiling::kKeyBytes, share.span.key(i), bounds, out, 1,
                                                          pair_at)) {
          fence_shared_writes();
          barrier_or(1, Tiling::kConsumerThreads, false);
        }
      }
      Products::start_output(out, weights, values_at(v_stage.index));
    };
    const auto add = [&](int i) {
      scores(s);
      if (!within(i, share.plan.full_lo, share.plan.full_hi)) hide(s, bounds, share.span.key(i));
      softmax.add(s, scores.factor, correction);
    };

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = place(p, layout, share, r).position;
      if (position >= 0) bounds[r] = RowBounds(p.mask, share.batch, position, static_cast<int>(p.kv_len));
    }
    barriers.q_full.wait(0);
    start_scores();
    wait_for_products<0>();
    release(barriers.k, k_stage);
    pin(s);
    add(share.begin);
    Products::round_weights(weights, s);
    for (int i = share.begin + 1; i < share.end; ++i) {
      start_scores();
      start_output(i - 1);
      wait_for_products<1>();
      release(barriers.k, k_stage);
      pin(s);
      add(i);
      wait_for_products<0>();
      release(barriers.v, v_stage);
      pin(out);
      Products::rescale(out, correction);
      Products::round_weights(weights, s);
    }
    start_output(share.end - 1);
    wait_for_products<0>();
    pin(out);
  }

  // Brings together what the cluster's blocks have. Each finishes some neighbouring fragments of eight columns; a
  // fragment travels as a thread holds it, to the same thread.
  DFLASH_INLINE void finish(const DecodeParams& p, const DecodeLayout& layout, const DecodeShare<kKeys>& share, int rank,
                            int ranks, Barrier& parts_full, uint32_t shared) {
    const Place places[2] = {place(p, layout, share, 0), place(p, layout, share, 1)};
    float total[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = softmax.sum[r] + __shfl_xor_sync(~0u, softmax.sum[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
    }
    if (ranks == 1) return write(p, share.batch, places, total, 0, kFragments, out);

    const int own = layout.own_fragments, first = rank * own, count = max(min(own, kFragments - first), 0);
    const uint32_t own_stats = shared + (consumer * 64 + row) * sizeof(float2);
    const uint32_t own_parts = shared + ranks * Tiling::kStatsBytes + threadIdx.x * 16;
    const uint32_t full = shared_address(&parts_full);
    if (threadIdx.x == 0) parts_full.expect(ranks * (Tiling::kStatsBytes + count * Tiling::kFragmentBytes));
    // After this nobody reads queries, keys or values any more, and nothing is on its way to them.
    cluster_wait_for_all();
    for (int to = threadIdx.x % 4; to < ranks; to += 4) {
      const uint32_t remote = remote_address(own_stats + rank * Tiling::kStatsBytes, to);
      send(remote, remote_address(full, to), softmax.largest[0], total[0]);
      send(remote + 8 * sizeof(float2), remote_address(full, to), softmax.largest[1], total[1]);
    }
    int to = 0, slot = rank * own;
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
      const float* const x = out + 4 * fragment;
      send(remote_address(own_parts + slot * Tiling::kFragmentBytes, to), remote_address(full, to), x[0], x[1], x[2], x[3]);
      if (++slot == (rank + 1) * own) {
        slot = rank * own;
        ++to;
      }
    }
    parts_full.wait(0);

    const auto stats = [&](int from, int r) {
      return read_shared_pair(own_stats + from * Tiling::kStatsBytes + r * 8 * sizeof(float2));
    };
    float base[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0};
#pragma unroll
    for (int from = 0; from < kMaxCluster; ++from) {
      if (from == ranks) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) base[r] = fmaxf(base[r], stats(from, r).x);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = base[r] == -kInfinity ? 0.0f : base[r] * scores.factor;
    float sums[kDim / 4] = {};  // of two blocks each finishes half
#pragma unroll 4
    for (int from = 0; from < ranks; ++from) {
      float weight[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 x = stats(from, r);
        weight[r] = exp2_of(x.x * scores.factor - base[r]);
        sum[r] = fmaf(weight[r], x.y, sum[r]);
      }
#pragma unroll
      for (int i = 0; i < kFragments / 2; ++i) {
        if (i >= count) break;
        const float4 x = read_shared_floats(own_parts + (from * own + i) * Tiling::kFragmentBytes);
        sums[4 * i] = fmaf(weight[0], x.x, sums[4 * i]);
        sums[4 * i + 1] = fmaf(weight[0], x.y, sums[4 * i + 1]);
        sums[4 * i + 2] = fmaf(weight[1], x.z, sums[4 * i + 2]);
        sums[4 * i + 3] = fmaf(weight[1], x.w, sums[4 * i + 3]);
      }
    }
    write(p, share.batch, places, sum, first, count, sums);
  }

  // Fragments [first, first + count) of the rows' results: x over the sums of the exponentials.
  template <int kCount>
  static DFLASH_INLINE void write(const DecodeParams& p, int batch, const Place (&places)[2], const float (&sum)[2],
                                  int first, int count, const float (&x)[kCount]) {
    count = min(count, static_cast<int>(p.head_dim) / 8 - first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (places[r].position < 0) continue;
      const float inverse = sum[r] == 0 ? 0.0f : 1 / sum[r];
      T* const to = static_cast<T*>(p.out) + batch * p.out_strides.batch + places[r].head * p.out_strides.head +
                    places[r].position * p.out_strides.row + first * 8 + threadIdx.x % 4 * 2;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        if (i >= count) break;
        *reinterpret_cast<uint32_t*>(to + i * 8) = pack<T>(x[4 * i + 2 * r] * inverse, x[4 * i + 2 * r + 1] * inverse);
      }
    }
  }
};

template <class T, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    decode(const __grid_constant__ DecodeParams p, const __grid_constant__ DecodeLayout layout,
           const __grid_constant__ DecodeMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& barriers = *reinterpret_cast<DecodeBarriers<Tiling::kStages>*>(shared + Tiling::kQueryBytes + Tiling::kRingBytes);
  const uint32_t queries = shared_address(shared), ring = queries + Tiling::kQueryBytes;
  const int rank = cluster_rank(), ranks = cluster_blocks();
  if (threadIdx.x == Tiling::kConsumerThreads) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) prefetch(*map);
  }
  if (threadIdx.x == 0) {
    barriers.q_full.init();
    barriers.parts_full.init();
    for (int i = 0; i < Tiling::kStages; ++i) {
      for (auto* into : {&barriers.k, &barriers.v}) {
        into->full[i].init();
        into->empty[i].init(Tiling::kConsumerThreads / 32);
      }
    }
    fence_barriers();
  }
  __syncthreads();
  wait_for_previous_kernel();
  const DecodeShare<Tiling::kKeys> share(p, layout, blockIdx.x / ranks, rank, ranks);
  if (threadIdx.x >= Tiling::kConsumerThreads) {
    if constexpr (Tiling::kMovesRegisters) give_registers<24>();
    if (threadIdx.x < Tiling::kConsumerThreads + 32 && share.begin < share.end) {
      produce<Tiling>(p, layout, maps, share, barriers, queries, ring);
      start_next_kernel();
    }
  } else {
    if constexpr (Tiling::kMovesRegisters) take_registers<240>();
    RowSums<T, Tiling> sums(p);
    if (share.begin < share.end) sums.consume(p, layout, share, barriers, queries, ring);
    sums.finish(p, layout, share, rank, ranks, barriers.parts_full, queries);
  }
}

// Keys of a page and keys of a tile are whole boxes.
int64_t box_keys_of(const DecodeParams& p, int64_t keys) {
  return p.pages.table == nullptr ? keys : std::gcd(p.pages.page_size, keys);
}

template <class T, class Tiling>
cudaError_t launch(const DecodeParams& p, cudaStream_t stream) {
  const auto kernel = decode<T, Tiling>;
  constexpr int kBytes = Tiling::kQueryBytes + Tiling::kRingBytes + sizeof(DecodeBarriers<Tiling::kStages>);
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
  const auto set_blocks = [&](int64_t items, unsigned ranks) {
    config.gridDim = dim3(static_cast<unsigned>(items * ranks));
    attributes[0].val.clusterDim = {ranks, 1, 1};
  };

  // As many blocks an item as there are multiprocessors for, and not so many that clusters wait for others to end.
  static const auto resident = [&] {
    std::array<int, kMaxCluster + 1> clusters{};
    for (unsigned ranks = 2; ranks <= kMaxCluster; ++ranks) {
      set_blocks(1, ranks);
      if (cudaOccupancyMaxActiveClusters(&clusters[ranks], kernel, &config) != cudaSuccess) clusters[ranks] = 0;
    }
    return clusters;
  }();
  int gpu = 0, processors = 0;
  status = cudaGetDevice(&gpu);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, gpu);
  if (status != cudaSuccess) return status;
  const int64_t fold = decode_fold(p), positions = kDecodeRows / fold;
  const int64_t tiles = p.plan_entries * tiles_of(p.q_len, positions * Tiling::kConsumers);
  const int64_t items = tiles * p.kv_heads * (p.plan_entries == 1 ? p.batch : 1);
  unsigned ranks = static_cast<unsigned>(std::clamp<int64_t>(processors / items, 1, kMaxCluster));
  while (ranks > 1 && resident[ranks] < items) --ranks;
  set_blocks(items, ranks);

  const DecodeLayout layout{static_cast<int>(fold),
                            static_cast<int>(positions),
                            static_cast<int>(box_keys_of(p, Tiling::kKeys)),
                            static_cast<unsigned>(p.kv_heads),
                            static_cast<unsigned>(tiles),
                            static_cast<int>((Tiling::kFragments + ranks - 1) / ranks)};
  DecodeMaps maps;
  const std::pair<CUtensorMap*, TensorBox> described[] = {
      {&maps.q, query_box(p, p.q, p.q_strides, fold)},
      {&maps.k, key_box(p, p.k, p.k_strides, layout.box_keys)},
      {&maps.v, key_box(p, p.v, p.v_strides, layout.box_keys)},
  };
  for (const auto& [map, box] : described) {
    status = make_tensor_map(map, p.dtype, box);
    if (status != cudaSuccess) return status;
  }
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
         (p.pages.table == nullptr || p.pages.page_size % 16 == 0) && copy_engine_reads(query_box(p, p.q, p.q_strides, 1)) &&
         copy_engine_reads(key_box(p, p.k, p.k_strides, 1)) && copy_engine_reads(key_box(p, p.v, p.v_strides, 1));
}

const char* decode_sm90(const DecodeParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = p.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16>(p, cuda_stream)
                                                         : device::launch<__half>(p, cuda_stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dflash
