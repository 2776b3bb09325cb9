// Forward of block_attn on Hopper.
//
// A block takes one item of work after another: a tile of rows (plan.h) of one batch entry and one group of folded
// query heads. Warpgroup 0 is the producer: a single thread has the copy engine bring the tile's queries, and the keys
// and values that the plan says it visits, into a ring of stages. The other warpgroups are the consumers, 64 rows each;
// with head_dim above 256 they share the 64 rows of the tile, each summing half of the output's columns.
//
// A consumer keeps its output and its softmax's weights in registers. In every step it starts the scores of the next
// keys, then the product of the previous keys' weights and values, and takes the softmax of the scores while that
// product runs. At head_dim 128 the consumers take turns at starting products, so that one's softmax runs beside the
// other's products. Only tiles of keys that the plan does not call full pay for masking.
#include <algorithm>
#include <bit>

#include "attn/kernels.h"
#include "attn/plan_check.h"
#include "attn/sm90/boxes.h"
#include "attn/sm90/key_runs.h"
#include "attn/sm90/tile_products.h"
#include "common/launch.h"
#include "common/named_barrier.h"
#include "common/setmaxnreg.h"

namespace dflash {
namespace device {
namespace {

template <int kDim>
struct Tiling {
  static constexpr int kRows = static_cast<int>(hopper_tile_rows(kDim));
  static constexpr int kKeys = kDim == 128 ? 128 : kDim == 256 ? 80 : 64;
  static constexpr int kStages = kDim == 64 ? 4 : kDim <= 256 ? 2 : 1;
  static constexpr int kQueryStages = kDim <= 128 ? 2 : 1;
  static constexpr bool kSharesRows = kRows == 64;
  static constexpr int kConsumers = kSharesRows ? 2 : kRows / 64;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 112;
  static_assert(registers_suffice(kConsumers, kProducerRegisters, kConsumerRegisters));
  static constexpr int kValueColumns = kSharesRows ? kDim / kConsumers : kDim;  // of one consumer
  static constexpr bool kTakesTurns = kDim == 128;
  // Otherwise consumers do not wait for each other, and each leaves out tiles that none of its own rows sees.
  static constexpr bool kLeavesOut = !kTakesTurns && !kSharesRows;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kItems = kQueryStages + 1;  // those whose queries are here and the next
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  // The output leaves through shared memory: through room of its own, or where the values were.
  static constexpr bool kOwnOutput = kDim <= 128;
  static constexpr int kBytes = (kQueryStages + kOwnOutput) * kQueryBytes + 2 * kStages * kKeyBytes + 1024;
};

// Which items a block takes, and in what order. Items are dealt from the longest tiles of the plan to the shortest, to
// the blocks in alternating directions: whoever got the longest item of a round gets the shortest of the next. Heads go
// in sections whose keys and values fit in the L2 cache together: a block first takes what it got of the first section.
struct Schedule {
  int fold_shift;          // 1 << fold_shift heads are folded
  unsigned heads, groups;  // folded heads: of all batch entries that a tile of the plan serves, of one
  unsigned section;        // folded heads
  unsigned items;

  // What the block is dealt in a round; past the last item once there are no more.
  DFLASH_INLINE unsigned item(unsigned round) const {
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
  DFLASH_INLINE unsigned section_of(unsigned item) const { return item % heads / section; }
};

struct Maps {
  CUtensorMap q, k, v, out;
  CUtensorMap k_granule, v_granule;  // boxes of kGranule keys, for tiles with a seam
};

struct alignas(16) Item {
  TilePlan plan;
  int batch, first_head;
};

// What the warpgroups share besides the tiles.
template <class Shape>
struct Shared {
  Item items[Shape::kItems];
  Mbarrier item_full[Shape::kItems];
  Mbarrier out_empty;
  Ring<Shape::kQueryStages> q;
  Ring<Shape::kStages> k, v;
};

template <class Shape>
class Producer {
 public:
  DFLASH_INLINE Producer(const AttentionForwardParams& p, const Schedule& schedule, const Maps& maps,
                         Shared<Shape>& shared, uint32_t q, uint32_t k, uint32_t v)
      : p_(p), schedule_(schedule), maps_(maps), shared_(shared), q_(q), k_(k), v_(v) {
    // The first time round every stage is empty.
    q_stage_.parity = k_stage_.parity = v_stage_.parity = 1;
  }

  DFLASH_INLINE void run() {
    Stage<Shape::kItems> present, next;
    if (schedule_.item(0) < schedule_.items) publish(next.index);
    next.advance();
    for (unsigned round = 0; schedule_.item(round) < schedule_.items; ++round) {
      const Item& item = shared_.items[present.index];
      shared_.item_full[present.index].wait(present.parity);
      const KeyRuns<Shape::kKeys> tiles(item.plan);
      const int batch = item.batch, kv_head = item.first_head / static_cast<int>(p_.heads / p_.kv_heads);
      // The consumers are done with the queries that were there, and with their item's plan long since.
      shared_.q.empty[q_stage_.index].wait(q_stage_.parity);
      load_queries(item);
      if (schedule_.item(round + 1) < schedule_.items) publish(next.index);
      present.advance();
      next.advance();
      for (int i = 0; i <= tiles.count(); ++i) {
        if (i < tiles.count()) load(maps_.k, maps_.k_granule, shared_.k, k_stage_, k_, tiles[i], kv_head, batch);
        if (!Shape::kOwnOutput && i == min(1, tiles.count())) shared_.out_empty.wait((round + 1) % 2);
        if (i > 0) load(maps_.v, maps_.v_granule, shared_.v, v_stage_, v_, tiles[i - 1], kv_head, batch);
      }
    }
  }

 private:
  using KeyStage = Stage<Shape::kStages>;

  // There is another item.
  DFLASH_INLINE unsigned next_item() {
    for (;;) {
      const unsigned item = schedule_.item(round_++);
      if (item >= schedule_.items) {
        round_ = 0;
        ++section_;
      } else if (schedule_.section_of(item) == section_) {
        return item;
      }
    }
  }

  DFLASH_INLINE void publish(int slot) {
    const unsigned next = next_item(), head = next % schedule_.heads;
    Item& item = shared_.items[slot];
    Mbarrier& full = shared_.item_full[slot];
    const TilePlan* plan = reinterpret_cast<const TilePlan*>(p_.plan) + next / schedule_.heads;
    item.batch = p_.plan_entries > 1 ? plan->entry : head / schedule_.groups;
    item.first_head = static_cast<int>(head % schedule_.groups << schedule_.fold_shift);
    full.arrive_and_expect_tx(sizeof(TilePlan));
    bulk_load(shared_address(&item.plan), plan, sizeof(TilePlan), full);
  }

  DFLASH_INLINE void load_queries(const Item& item) {
    Mbarrier& full = shared_.q.full[q_stage_.index];
    full.arrive_and_expect_tx(Shape::kQueryBytes);
    uint32_t to = q_ + q_stage_.index * Shape::kQueryBytes;
    for (int part = 0; part < Shape::kRows / 64; ++part) {
      for (int panel = 0; panel < Shape::kPanels; ++panel, to += kQueryPanelBytes) {
        tma_load(to, maps_.q, panel * kPanelColumns, item.first_head,
                 item.plan.first + part * (64 >> schedule_.fold_shift), item.batch, full);
      }
    }
    q_stage_.advance();
  }

  static DFLASH_INLINE void load(const CUtensorMap& map, const CUtensorMap& granule_map, Ring<Shape::kStages>& ring,
                                 KeyStage& stage, uint32_t to, const KeyTile<Shape::kKeys>& tile, int kv_head,
                                 int batch) {
    ring.empty[stage.index].wait(stage.parity);
    Mbarrier& full = ring.full[stage.index];
    full.arrive_and_expect_tx(Shape::kKeyBytes);
    to += stage.index * Shape::kKeyBytes;
    for (int panel = 0; panel < Shape::kPanels; ++panel, to += Shape::kKeyPanelBytes) {
      const int column = panel * kPanelColumns;
      if (tile.seam == Shape::kKeys) {
        tma_load(to, map, column, tile.first, kv_head, batch, full);
        continue;
      }
      for (int key = 0; key < Shape::kKeys; key += kGranule) {
        tma_load(to + key * kPanelRowBytes, granule_map, column, tile.first + key + (key < tile.seam ? 0 : tile.jump),
                 kv_head, batch, full);
      }
    }
    stage.advance();
  }

  const AttentionForwardParams& p_;
  const Schedule& schedule_;
  const Maps& maps_;
  Shared<Shape>& shared_;
  const uint32_t q_, k_, v_;
  Stage<Shape::kQueryStages> q_stage_;
  KeyStage k_stage_, v_stage_;
  unsigned section_ = 0, round_ = 0;  // where to look for the next item
};

template <class T, class Shape>
class Consumer {
 public:
  DFLASH_INLINE Consumer(const AttentionForwardParams& p, const Schedule& schedule, const Maps& maps,
                         Shared<Shape>& shared, uint32_t q, uint32_t k, uint32_t v, uint32_t out)
      : p_(p),
        schedule_(schedule),
        maps_(maps),
        shared_(shared),
        index_(uniform(threadIdx.x / kWarpgroup - 1)),
        part_(Shape::kSharesRows ? 0 : index_),
        row_(threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4),
        q_(q + part_ * Shape::kPanels * kQueryPanelBytes),
        k_(k),
        v_(v + (Shape::kSharesRows ? index_ * kOutPanels * Shape::kKeyPanelBytes : 0)),
        out_(out + index_ * kOutPanels * kQueryPanelBytes),
        scores_(p) {}

  DFLASH_INLINE void run() {
    if (Shape::kTakesTurns && index_ == Shape::kConsumers - 1) pass_turn();
    Stage<Shape::kItems> present;
    for (unsigned round = 0; schedule_.item(round) < schedule_.items; ++round) {
      shared_.item_full[present.index].wait(present.parity);
      consume(shared_.items[present.index]);
      present.advance();
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait_group_read<0>();
  }

 private:
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kOutPanels = Shape::kValueColumns / kPanelColumns;
  using KeyStage = Stage<Shape::kStages>;
  using Products = TileProducts<T, kKeys, Shape::kPanels * kPanelColumns, Shape::kValueColumns>;

  DFLASH_INLINE void consume(const Item& item) {
    const KeyRuns<kKeys> tiles(item.plan);
    const int first = item.plan.first + part_ * (64 >> schedule_.fold_shift);
    const int batch = item.batch, head = item.first_head;
    float out[Shape::kValueColumns / 2] = {};
    OnlineSoftmax softmax;
    // Asked for here, as they come from far away, and needed after the first scores.
    int4 asked[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = first + position_of(row_ + 8 * r);
      asked[r] = position < p_.q_len ? read_bounds(p_.mask, batch, position) : make_int4(0, 0, 0, 0);
    }
    shared_.q.full[q_stage_.index].wait(q_stage_.parity);

    int begin = 0, end = tiles.count();
    if (Shape::kLeavesOut) {
      const int2 keys = keys_of(batch, first);
      while (begin < end && !tiles[begin].meets(keys.x, keys.y)) ++begin;
      while (begin < end && !tiles[end - 1].meets(keys.x, keys.y)) --end;
      leave_out(begin);
    }
    const int kv_len = static_cast<int>(p_.kv_len);
    // The item's plan is there until the queries are released.
    const auto leave_queries = [&](const RowBounds(&bounds)[2]) {
      const PlanCheck check(item.plan);
#pragma unroll
      for (int r = 0; r < 2; ++r) softmax.sum[r] += check.addend(bounds[r]);
      __syncwarp();
      release_queries();
    };
    if (begin < end) {
      float s[kKeys / 2], correction[2];
      typename Products::Weights weights;
      // Worked out one tile ahead, beside exponentials, as uniform arithmetic has long latencies.
      KeyTile<kKeys> next = tiles[begin + 1];
      shared_.k.full[k_stage_.index].wait(k_stage_.parity);
      start_scores(s);
      const RowBounds bounds[2] = {RowBounds(asked[0], kv_len), RowBounds(asked[1], kv_len)};
      wgmma_wait_group<0>();
      release(shared_.k, k_stage_);
      fence_accumulator(s);
      add(softmax, s, tiles[begin], bounds, correction);
      Products::round_weights(weights, s);
      for (int i = begin + 1; i < end; ++i) {
        const KeyTile<kKeys> tile = next;
        next = tiles[i + 1];
        // The values were asked for right after the keys. With two stages both are there by now, and the turn is
        // shorter without a wait in it; with one, the scores need not wait for the values.
        shared_.k.full[k_stage_.index].wait(k_stage_.parity);
        if (Shape::kStages > 1) shared_.v.full[v_stage_.index].wait(v_stage_.parity);
        take_turn();
        start_scores(s);
        if (Shape::kStages == 1) shared_.v.full[v_stage_.index].wait(v_stage_.parity);
        start_output(out, weights);
        pass_turn();
        wgmma_wait_group<1>();
        release(shared_.k, k_stage_);
        fence_accumulator(s);
        add(softmax, s, tile, bounds, correction);
        Products::finish_softmax(softmax, s, out_);
        wgmma_wait_group<0>();
        release(shared_.v, v_stage_);
        fence_accumulator(out);
        Products::rescale(out, correction);
        Products::round_weights(weights, s);
      }
      leave_queries(bounds);
      shared_.v.full[v_stage_.index].wait(v_stage_.parity);
      start_output(out, weights);
      wgmma_wait_group<0>();
      release(shared_.v, v_stage_);
      fence_accumulator(out);
    } else {
      leave_queries({RowBounds(asked[0], kv_len), RowBounds(asked[1], kv_len)});
    }
    if (Shape::kLeavesOut) leave_out(tiles.count() - end);

    float inverse[2], lse[2];
    softmax.finish(scores_.factor, inverse, lse);
    write_out(batch, head, first, out, inverse);
    write_lse(batch, head, first, lse);
  }

  // The keys that the consumer's rows see lie in [x, y). Every warp finds out for all 64 rows.
  DFLASH_INLINE int2 keys_of(int batch, int first) const {
    int lo = static_cast<int>(p_.kv_len), hi = 0;
    const auto add = [&](int begin, unsigned length) {
      if (length > 0) lo = min(lo, begin);
      if (length > 0) hi = max(hi, begin + static_cast<int>(length));
    };
#pragma unroll
    for (int row = 0; row < 64; row += 32) {
      const int position = first + position_of(row + threadIdx.x % 32);
      if (position >= p_.q_len) continue;
      const RowBounds bounds(p_.mask, batch, position, static_cast<int>(p_.kv_len));
      add(bounds.ctx_lo, bounds.ctx_len);
      add(bounds.blk_lo, bounds.blk_len);
    }
    return {__reduce_min_sync(~0u, lo), __reduce_max_sync(~0u, hi)};
  }

  // The next tiles are of no use to the consumer.
  DFLASH_INLINE void leave_out(int tiles) {
    for (; tiles > 0; --tiles) {
      shared_.k.full[k_stage_.index].wait(k_stage_.parity);
      release(shared_.k, k_stage_);
      shared_.v.full[v_stage_.index].wait(v_stage_.parity);
      release(shared_.v, v_stage_);
    }
  }

  // A row of a tile stands at this position after the tile's first.
  DFLASH_INLINE int position_of(int row) const { return row >> schedule_.fold_shift; }

  DFLASH_INLINE void start_scores(typename Products::Scored& s) const {
    Products::start_scores(s, q_ + q_stage_.index * Shape::kQueryBytes, k_ + k_stage_.index * Shape::kKeyBytes);
  }
  DFLASH_INLINE void start_output(typename Products::Output& out, const typename Products::Weights& weights) const {
    Products::start_output(out, weights, v_ + v_stage_.index * Shape::kKeyBytes);
  }

  DFLASH_INLINE void add(OnlineSoftmax& softmax, float (&s)[kKeys / 2], const KeyTile<kKeys>& tile,
                         const RowBounds (&bounds)[2], float (&correction)[2]) const {
    scores_(s);
    if (!tile.is_full) hide(s, bounds, tile);
    softmax.add(s, scores_.factor, correction);
  }

  DFLASH_INLINE void take_turn() const {
    if (Shape::kTakesTurns) named_barrier_sync(kTurnBarrier + index_, 2 * kWarpgroup);
  }
  DFLASH_INLINE void pass_turn() const {
    const int next = index_ == Shape::kConsumers - 1 ? 0 : index_ + 1;
    if (Shape::kTakesTurns) named_barrier_arrive(kTurnBarrier + next, 2 * kWarpgroup);
  }

  // The warp is done with the stage.
  DFLASH_INLINE void release(Ring<Shape::kStages>& ring, KeyStage& stage) const {
    if (threadIdx.x % 32 == 0) ring.empty[stage.index].arrive();
    stage.advance();
  }
  DFLASH_INLINE void release_queries() {
    if (threadIdx.x % 32 == 0) shared_.q.empty[q_stage_.index].arrive();
    q_stage_.advance();
  }

  DFLASH_INLINE void write_lse(int batch, int head, int first, const float (&lse)[2]) const {
    if (p_.lse == nullptr || threadIdx.x % 4 != 0 || (Shape::kSharesRows && index_ > 0)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + 8 * r, position = first + position_of(row);
      if (position < p_.q_len) {
        const int64_t head_row = batch * p_.heads + head + row - (position_of(row) << schedule_.fold_shift);
        static_cast<float*>(p_.lse)[head_row * p_.q_len + position] = lse[r];
      }
    }
  }

  DFLASH_INLINE void write_out(int batch, int head, int first, const float (&out)[Shape::kValueColumns / 2],
                               const float (&inverse)[2]) const {
    const bool leads = threadIdx.x % kWarpgroup == 0;
    if (Shape::kOwnOutput) {
      if (leads) bulk_wait_group_read<0>();
      named_barrier_sync(kOwnBarrier + index_, kWarpgroup);
    } else {
      // All have read the last values.
      named_barrier_sync(kConsumersBarrier, Shape::kConsumers * kWarpgroup);
    }
    Products::write_rows(out_, out, inverse);
    named_barrier_sync(kOwnBarrier + index_, kWarpgroup);
    if (!leads) return;
    const int first_panel = Shape::kSharesRows ? index_ * kOutPanels : 0;
    for (int panel = 0; panel < kOutPanels; ++panel) {
      tma_store(maps_.out, out_ + panel * kQueryPanelBytes, (first_panel + panel) * kPanelColumns, head, first,
                batch);
    }
    bulk_commit_group();
    if (!Shape::kOwnOutput) {
      bulk_wait_group_read<0>();
      shared_.out_empty.arrive();
    }
  }

  // Named barriers: turns at starting products, a consumer's own threads, all consumers.
  static constexpr int kTurnBarrier = 1, kOwnBarrier = 3, kConsumersBarrier = 7;

  const AttentionForwardParams& p_;
  const Schedule& schedule_;
  const Maps& maps_;
  Shared<Shape>& shared_;
  const int index_, part_;
  const int row_;  // the thread's first among the consumer's 64; the other is 8 below
  const uint32_t q_, k_, v_, out_;
  const Scores scores_;
  Stage<Shape::kQueryStages> q_stage_;
  KeyStage k_stage_, v_stage_;
};

template <class T, int kDim>
__global__ void __launch_bounds__(Tiling<kDim>::kThreads, 1)
    block_attn_forward_sm90(const __grid_constant__ AttentionForwardParams p, const __grid_constant__ Schedule schedule,
            const __grid_constant__ Maps maps) {
  using Shape = Tiling<kDim>;
  extern __shared__ unsigned char unaligned[];
  __shared__ Shared<Shape> storage;
  // By an address in a uniform register: asked where its shared memory lies, a block takes 50 clocks to answer, and the
  // compiler would ask anew for every tile.
  Shared<Shape>& shared = *static_cast<Shared<Shape>*>(__cvta_shared_to_generic(uniform(shared_address(&storage))));
  const uint32_t q = uniform((shared_address(unaligned) + 1023) / 1024 * 1024);
  const uint32_t k = q + Shape::kQueryStages * Shape::kQueryBytes, v = k + Shape::kStages * Shape::kKeyBytes;
  const uint32_t out = Shape::kOwnOutput ? v + Shape::kStages * Shape::kKeyBytes : v;
  if (threadIdx.x == 0) {
    for (Mbarrier& full : shared.item_full) full.init();
    shared.out_empty.init(Shape::kConsumers);
    shared.q.init(Shape::kConsumers * 4);
    shared.k.init(Shape::kConsumers * 4);
    shared.v.init(Shape::kConsumers * 4);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_dec<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) Producer<Shape>(p, schedule, maps, shared, q, k, v).run();
  } else {
    setmaxnreg_inc<Shape::kConsumerRegisters>();
    Consumer<T, Shape>(p, schedule, maps, shared, q, k, v, out).run();
  }
}

// Items are counted in 32 bits, and a little beyond the last.
constexpr int64_t kMaxItems = int64_t(1) << 31;

// Folded heads of all batch entries that a tile of the plan serves.
int64_t heads_of(const AttentionForwardParams& p) {
  return p.heads / fold_of(p.heads, p.kv_heads) * (p.batch / p.plan_entries);
}

int64_t items_of(const AttentionForwardParams& p, int64_t rows_per_tile) {
  return p.plan_entries * tiles_of(p.q_len, rows_per_tile / fold_of(p.heads, p.kv_heads)) * heads_of(p);
}

Schedule schedule_of(const AttentionForwardParams& p, int64_t items) {
  // What the L2 cache keeps of keys and values beside what goes through it.
  constexpr int64_t kCachedBytes = 36 << 20;
  const int64_t fold = fold_of(p.heads, p.kv_heads), heads = heads_of(p);
  const int64_t bytes = p.batch * p.kv_heads * p.kv_len * p.head_dim * 2 * 2;
  const int64_t sections = std::clamp<int64_t>((bytes + kCachedBytes - 1) / kCachedBytes, 1, heads);
  const int64_t section = (heads + sections - 1) / sections;
  const auto narrow = [](int64_t x) { return static_cast<unsigned>(x); };
  return {std::countr_zero(narrow(fold)), narrow(heads), narrow(p.heads / fold), narrow(section), narrow(items)};
}

template <class T, int kDim>
cudaError_t launch(const AttentionForwardParams& p, cudaStream_t stream) {
  using Shape = Tiling<kDim>;
  const auto kernel = block_attn_forward_sm90<T, kDim>;
  const int64_t fold = fold_of(p.heads, p.kv_heads);
  Maps maps;
  const cudaError_t status = make_tensor_maps(p.dtype, {{&maps.q, query_box(p, p.q, p.q_strides, fold)},
                                                        {&maps.out, query_box(p, p.out, p.out_strides, fold)},
                                                        {&maps.k, key_box(p, p.k, p.k_strides, Shape::kKeys)},
                                                        {&maps.v, key_box(p, p.v, p.v_strides, Shape::kKeys)},
                                                        {&maps.k_granule, key_box(p, p.k, p.k_strides, kGranule)},
                                                        {&maps.v_granule, key_box(p, p.v, p.v_strides, kGranule)}});
  if (status != cudaSuccess) return status;
  const int64_t items = items_of(p, Shape::kRows);
  if (items > kMaxItems) return cudaErrorInvalidConfiguration;
  const Schedule schedule = schedule_of(p, items);
  const LaunchShape shape{std::min<int64_t>(items, multiprocessors_of(stream)), Shape::kThreads, Shape::kBytes};
  return launch_kernel(kernel, shape, stream, p, schedule, maps);
}

}  // namespace
}  // namespace device

bool forward_sm90_runs_here() { return hopper_kernels_serve(); }

uint32_t forward_sm90_misses(const AttentionForwardParams& p) {
  if (!hopper_kernels_serve() || p.kv_len == 0) return kNoSuchKernel;
  return copy_engine_serves(p) ? 0 : kForwardLayout;
}

const char* forward_sm90(const AttentionForwardParams& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return checked_launch([&] {
    return with_dim(p.head_dim, [&]<int kDim> {
      return p.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16, kDim>(p, cuda_stream)
                                         : device::launch<__half, kDim>(p, cuda_stream);
    });
  });
}

}  // namespace dflash
