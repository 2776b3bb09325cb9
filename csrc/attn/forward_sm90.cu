// Forward of block_attn on Hopper.
//
// A block of three warpgroups takes one item of work after another: a tile of rows (plan.h) of one batch entry and one
// group of folded query heads. Warpgroup 0 is the producer: a single thread has the copy engine bring the tile's
// queries, and the keys and values that the plan says it visits, into a ring of stages. Warpgroups 1 and 2 are the
// consumers, 64 rows each; with head_dim above 256 they share the 64 rows of the tile, each summing half of the output's
// columns.
//
// A consumer keeps its output and its softmax's weights in registers. In every step it starts the scores of the next
// keys, then the product of the previous keys' weights and values, and takes the softmax of the scores while that
// product runs. The two consumers take turns at starting products, so that one's softmax runs beside the other's
// products. Only tiles of keys that the plan does not call full pay for masking.
#include "attn/kernels.h"
#include "attn/key_tiles.h"
#include "attn/softmax.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/wgmma.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <int kDim>
struct Tiling {
  static constexpr int kRows = static_cast<int>(tile_rows(kDim));
  static constexpr int kKeys = kDim <= 128 ? 128 : kDim == 256 ? 80 : 64;
  static constexpr int kStages = kDim <= 256 ? 2 : 1;
  static constexpr bool kSharesRows = kRows == 64;
  static constexpr int kValueColumns = kSharesRows ? kDim / kConsumers : kDim;  // of one consumer
  static constexpr bool kTakesTurns = kDim <= 128;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kQueryPanelBytes = 64 * kPanelRowBytes;  // the rows of one consumer
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  // The output leaves through shared memory: through room of its own, or where the queries were.
  static constexpr bool kOwnOutput = kDim <= 128;
  static constexpr int kBytes = (kOwnOutput ? 2 : 1) * kQueryBytes + 2 * kStages * kKeyBytes + 1024;
};

// Turns at starting products are named barriers 1 and 2; a consumer's own threads meet at barrier 3 or 4, all at 5.
constexpr int kTurnBarrier = 1, kOwnBarrier = 3, kConsumersBarrier = 5;

struct Maps {
  CUtensorMap q, k, v, out;
};

template <class Shape>
struct Ring {
  Barrier full[Shape::kStages], empty[Shape::kStages];
};

template <class Shape>
struct Barriers {
  Barrier q_full, q_empty;
  Ring<Shape> k, v;
};

// Position in a ring of stages.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  DFLASH_INLINE void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// What is to be computed, in the order of the plan, shared out among the blocks in alternating directions: whoever got
// the most of a round gets the least of the next.
struct Work {
  TilePlan plan;
  int batch, first_head, kv_head;

  DFLASH_INLINE static bool get(Work& work, const AttentionForwardParams& p, int fold, int64_t round) {
    const int64_t groups = p.heads / fold, entries = p.batch / p.plan_entries;
    const int64_t rows_per_tile = tile_rows(p.head_dim);
    const int64_t tiles = p.plan_entries * tiles_of(p.q_len, rows_per_tile / fold);
    const int64_t place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t item = round * gridDim.x + place;
    if (item >= tiles * entries * groups) return false;
    work.plan = reinterpret_cast<const TilePlan*>(p.plan)[item / (entries * groups)];
    const int rest = item % (entries * groups);
    work.batch = p.plan_entries > 1 ? work.plan.entry : rest / groups;
    work.first_head = rest % groups * fold;
    work.kv_head = work.first_head / (p.heads / p.kv_heads);
    return true;
  }
};

template <class Shape>
DFLASH_INLINE void produce(const AttentionForwardParams& p, int fold, const Maps& maps, Barriers<Shape>& barriers,
                           uint32_t q_shared, uint32_t k_shared, uint32_t v_shared) {
  Stage<Shape::kStages> k_stage, v_stage;
  uint32_t q_parity = 1;
  // The first time round every stage is empty.
  k_stage.parity = v_stage.parity = 1;
  const auto copy = [&](const CUtensorMap& map, Ring<Shape>& ring, Stage<Shape::kStages>& stage, uint32_t shared,
                        int key, const Work& work) {
    ring.empty[stage.index].wait(stage.parity);
    ring.full[stage.index].expect(Shape::kKeyBytes);
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      ring.full[stage.index].copy(shared + stage.index * Shape::kKeyBytes + panel * Shape::kKeyPanelBytes, map,
                                  panel * kPanelColumns, key, work.kv_head, work.batch);
    }
    stage.advance();
  };
  Work work;
  for (int64_t round = 0; Work::get(work, p, fold, round); ++round) {
    const KeyTiles<Shape::kKeys> tiles(work.plan);
    barriers.q_empty.wait(q_parity);
    barriers.q_full.expect(Shape::kQueryBytes);
    for (int half = 0; half < Shape::kRows / 64; ++half) {
      for (int panel = 0; panel < Shape::kPanels; ++panel) {
        barriers.q_full.copy(q_shared + (half * Shape::kPanels + panel) * Shape::kQueryPanelBytes, maps.q,
                             panel * kPanelColumns, work.first_head, work.plan.first + half * (64 / fold), work.batch);
      }
    }
    q_parity ^= 1;
    if (tiles.count() == 0) continue;
    copy(maps.k, barriers.k, k_stage, k_shared, tiles[0], work);
    for (int i = 1; i < tiles.count(); ++i) {
      copy(maps.k, barriers.k, k_stage, k_shared, tiles[i], work);
      copy(maps.v, barriers.v, v_stage, v_shared, tiles[i - 1], work);
    }
    copy(maps.v, barriers.v, v_stage, v_shared, tiles[tiles.count() - 1], work);
  }
}

template <class T, class Shape>
class Consumer {
 public:
  DFLASH_INLINE Consumer(const AttentionForwardParams& p, int fold, const Maps& maps, Barriers<Shape>& barriers,
                         uint32_t q_shared, uint32_t k_shared, uint32_t v_shared, uint32_t out_shared)
      : p_(p),
        fold_(fold),
        maps_(maps),
        barriers_(barriers),
        index_(threadIdx.x / kWarpgroup - 1),
        half_(Shape::kSharesRows ? 0 : index_),
        q_(q_shared + half_ * Shape::kPanels * Shape::kQueryPanelBytes),
        k_(k_shared),
        v_(v_shared + (Shape::kSharesRows ? index_ * (Shape::kPanels / kConsumers) * Shape::kKeyPanelBytes : 0)),
        out_(out_shared + index_ * kOutPanels * Shape::kQueryPanelBytes),
        scores_(p) {}

  DFLASH_INLINE void run() {
    if (Shape::kTakesTurns && index_ == kConsumers - 1) pass_turn();
    Work work;
    for (int64_t round = 0; Work::get(work, p_, fold_, round); ++round) consume(work);
  }

 private:
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kOutPanels = Shape::kValueColumns / kPanelColumns;
  static constexpr int kSteps = kKeys / 16;
  using KeyStage = Stage<Shape::kStages>;

  DFLASH_INLINE void consume(const Work& work) {
    const KeyTiles<kKeys> tiles(work.plan);
    // The thread's rows within the 64.
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
    RowBounds bounds[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = position_of(work, row + 8 * r);
      if (position < p_.q_len) {
        bounds[r] = RowBounds(p_.mask, work.batch, position, static_cast<int>(p_.kv_len));
      }
    }
    float out[Shape::kValueColumns / 2] = {};
    OnlineSoftmax softmax;
    barriers_.q_full.wait(q_parity_);
    q_parity_ ^= 1;

    if (tiles.count() > 0) {
      float s[kKeys / 2], correction[2];
      uint32_t weights[kSteps][4];
      barriers_.k.full[k_stage_.index].wait(k_stage_.parity);
      start_scores(s);
      wait_for_products<0>();
      release(barriers_.k, k_stage_);
      pin(s);
      add(softmax, s, tiles, 0, bounds, correction);
      round_weights(weights, s);
      for (int i = 1; i < tiles.count(); ++i) {
        barriers_.k.full[k_stage_.index].wait(k_stage_.parity);
        take_turn();
        start_scores(s);
        barriers_.v.full[v_stage_.index].wait(v_stage_.parity);
        start_output(out, weights);
        pass_turn();
        wait_for_products<1>();
        release(barriers_.k, k_stage_);
        pin(s);
        add(softmax, s, tiles, i, bounds, correction);
        wait_for_products<0>();
        release(barriers_.v, v_stage_);
        pin(out);
#pragma unroll
        for (int j = 0; j < Shape::kValueColumns / 2; ++j) out[j] *= correction[j / 2 % 2];
        round_weights(weights, s);
      }
      if (Shape::kOwnOutput) release_queries();
      barriers_.v.full[v_stage_.index].wait(v_stage_.parity);
      start_output(out, weights);
      wait_for_products<0>();
      release(barriers_.v, v_stage_);
      pin(out);
    } else if (Shape::kOwnOutput) {
      release_queries();
    }

    float inverse[2], lse[2];
    softmax.finish(scores_.factor, inverse, lse);
    write_lse(work, row, lse);
    write_out(work, out, inverse);
  }

  DFLASH_INLINE int position_of(const Work& work, int row) const {
    return work.plan.first + (half_ * 64 + row) / fold_;
  }

  // s = q k^T
  DFLASH_INLINE void start_scores(float (&s)[kKeys / 2]) const {
    pin(s);
    begin_products();
    const uint64_t q = row_operand(renewed(q_)), k = row_operand(renewed(k_ + k_stage_.index * Shape::kKeyBytes));
#pragma unroll
    for (int step = 0; step < Shape::kPanels * 4; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Product<T, kKeys>::rows_by_rows(s, q + (panel * Shape::kQueryPanelBytes + within) / 16,
                                      k + (panel * Shape::kKeyPanelBytes + within) / 16, step > 0);
    }
    commit_products();
  }

  // out += weights v
  DFLASH_INLINE void start_output(float (&out)[Shape::kValueColumns / 2], const uint32_t (&weights)[kSteps][4]) const {
    pin(out);
    begin_products();
    const uint64_t v = column_operand(v_ + v_stage_.index * Shape::kKeyBytes, Shape::kKeyPanelBytes);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Product<T, Shape::kValueColumns>::registers_by_columns(out, weights[step], v + step * 16 * kPanelRowBytes / 16,
                                                             true);
    }
    commit_products();
  }

  DFLASH_INLINE void add(OnlineSoftmax& softmax, float (&s)[kKeys / 2], const KeyTiles<kKeys>& tiles, int i,
                         const RowBounds (&bounds)[2], float (&correction)[2]) const {
    scores_(s);
    const int key = tiles[i];
    if (!tiles.is_full(key)) hide(s, bounds, key);
    softmax.add(s, scores_.factor, correction);
  }

  static DFLASH_INLINE void round_weights(uint32_t (&weights)[kSteps][4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  DFLASH_INLINE void take_turn() const {
    if (Shape::kTakesTurns) named_barrier_wait(kTurnBarrier + index_, 2 * kWarpgroup);
  }
  DFLASH_INLINE void pass_turn() const {
    if (Shape::kTakesTurns) named_barrier_arrive(kTurnBarrier + (index_ + 1) % kConsumers, 2 * kWarpgroup);
  }

  // The warp is done with the stage.
  DFLASH_INLINE void release(Ring<Shape>& ring, KeyStage& stage) const {
    if (threadIdx.x % 32 == 0) ring.empty[stage.index].arrive();
    stage.advance();
  }
  DFLASH_INLINE void release_queries() const {
    if (threadIdx.x % 32 == 0) barriers_.q_empty.arrive();
  }

  DFLASH_INLINE void write_lse(const Work& work, int row, const float (&lse)[2]) const {
    if (p_.lse == nullptr || threadIdx.x % 4 != 0 || (Shape::kSharesRows && index_ > 0)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t position = position_of(work, row + 8 * r), head = work.first_head + (row + 8 * r) % fold_;
      if (position < p_.q_len) {
        static_cast<float*>(p_.lse)[(work.batch * p_.heads + head) * p_.q_len + position] = lse[r];
      }
    }
  }

  DFLASH_INLINE void write_out(const Work& work, const float (&out)[Shape::kValueColumns / 2],
                               const float (&inverse)[2]) const {
    const bool leads = threadIdx.x % kWarpgroup == 0;
    if (Shape::kOwnOutput) {
      if (leads) wait_for_stores();
      named_barrier_wait(kOwnBarrier + index_, kWarpgroup);
    } else if (Shape::kSharesRows) {
      named_barrier_wait(kConsumersBarrier, kConsumers * kWarpgroup);  // both have read the queries
    }
    // Lanes 0 to 15 give the addresses of rows 0 to 15 in one chunk of 8 columns, lanes 16 to 31 in the next.
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 16, chunk = threadIdx.x % 32 / 16;
#pragma unroll
    for (int panel = 0; panel < kOutPanels; ++panel) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float* const x = out + panel * 32 + pair * 8;
        const uint32_t address = out_ + panel * Shape::kQueryPanelBytes + row * kPanelRowBytes +
                                 ((2 * pair + chunk) ^ (row % 8)) * 16;
        store_matrices(address, pack<T>(x[0] * inverse[0], x[1] * inverse[0]),
                       pack<T>(x[2] * inverse[1], x[3] * inverse[1]), pack<T>(x[4] * inverse[0], x[5] * inverse[0]),
                       pack<T>(x[6] * inverse[1], x[7] * inverse[1]));
      }
    }
    fence_shared_writes();
    named_barrier_wait(kOwnBarrier + index_, kWarpgroup);
    if (!leads) return;
    const int first_panel = Shape::kSharesRows ? index_ * kOutPanels : 0;
    for (int panel = 0; panel < kOutPanels; ++panel) {
      store_box(maps_.out, out_ + panel * Shape::kQueryPanelBytes, (first_panel + panel) * kPanelColumns,
                work.first_head, work.plan.first + half_ * (64 / fold_), work.batch);
    }
    commit_stores();
    if (!Shape::kOwnOutput) {
      wait_for_stores();
      barriers_.q_empty.arrive();
    }
  }

  const AttentionForwardParams& p_;
  const int fold_;
  const Maps& maps_;
  Barriers<Shape>& barriers_;
  const int index_, half_;
  const uint32_t q_, k_, v_, out_;
  const Scores scores_;
  KeyStage k_stage_, v_stage_;
  uint32_t q_parity_ = 0;
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ AttentionForwardParams p, const int fold, const __grid_constant__ Maps maps) {
  using Shape = Tiling<kDim>;
  extern __shared__ unsigned char unaligned[];
  __shared__ Barriers<Shape> barriers;
  const uint32_t q = (shared_address(unaligned) + 1023) / 1024 * 1024;
  const uint32_t k = q + Shape::kQueryBytes, v = k + Shape::kStages * Shape::kKeyBytes;
  const uint32_t out = Shape::kOwnOutput ? v + Shape::kStages * Shape::kKeyBytes : q;
  if (threadIdx.x == 0) {
    barriers.q_full.init();
    barriers.q_empty.init(Shape::kOwnOutput ? kConsumers * 4 : kConsumers);
    for (int i = 0; i < Shape::kStages; ++i) {
      for (Ring<Shape>* ring : {&barriers.k, &barriers.v}) {
        ring->full[i].init();
        ring->empty[i].init(kConsumers * 4);
      }
    }
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Shape>(p, fold, maps, barriers, q, k, v);
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, Shape>(p, fold, maps, barriers, q, k, v, out).run();
  }
}

// [B, H, L, D] as the copy engine's (D, H, L, B), or (D, L, H, B) where rows come before heads.
TensorBox box_of(const AttentionForwardParams& p, const void* data, const HeadStrides& strides, int64_t heads,
                 int64_t rows) {
  return {data, {p.head_dim, heads, rows, p.batch}, {1, strides.head, strides.row, strides.batch}, {}};
}

TensorBox query_box(const AttentionForwardParams& p, const void* data, const HeadStrides& strides) {
  const int64_t fold = fold_of(p.heads, p.kv_heads);
  TensorBox box = box_of(p, data, strides, p.heads, p.q_len);
  const int64_t sizes[4] = {kPanelColumns, fold, 64 / fold, 1};
  for (int d = 0; d < 4; ++d) box.box[d] = sizes[d];
  return box;
}

TensorBox key_box(const AttentionForwardParams& p, const void* data, const HeadStrides& strides, int64_t keys) {
  TensorBox box{data, {p.head_dim, p.kv_len, p.kv_heads, p.batch}, {1, strides.row, strides.head, strides.batch},
                {kPanelColumns, keys, 1, 1}};
  return box;
}

template <class T, int kDim>
cudaError_t launch(const AttentionForwardParams& p, cudaStream_t stream) {
  using Shape = Tiling<kDim>;
  const auto kernel = forward<T, kDim>;
  Maps maps;
  cudaError_t status = make_tensor_map(&maps.q, p.dtype, query_box(p, p.q, p.q_strides));
  if (status == cudaSuccess) status = make_tensor_map(&maps.out, p.dtype, query_box(p, p.out, p.out_strides));
  if (status == cudaSuccess) status = make_tensor_map(&maps.k, p.dtype, key_box(p, p.k, p.k_strides, Shape::kKeys));
  if (status == cudaSuccess) status = make_tensor_map(&maps.v, p.dtype, key_box(p, p.v, p.v_strides, Shape::kKeys));
  int gpu = 0, processors = 0;
  if (status == cudaSuccess) status = cudaGetDevice(&gpu);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, gpu);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  }
  if (status != cudaSuccess) return status;
  const int fold = static_cast<int>(fold_of(p.heads, p.kv_heads));
  const int64_t items = tiles_of(p.q_len, Shape::kRows / fold) * p.batch * (p.heads / fold);
  kernel<<<static_cast<unsigned>(items < processors ? items : processors), kThreads, Shape::kBytes, stream>>>(p, fold,
                                                                                                             maps);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const AttentionForwardParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch<T, 64>(p, stream);
  if (p.head_dim <= 128) return launch<T, 128>(p, stream);
  if (p.head_dim <= 256) return launch<T, 256>(p, stream);
  return launch<T, 512>(p, stream);
}

}  // namespace
}  // namespace device

bool forward_sm90_serves(const AttentionForwardParams& p) {
  int gpu = 0, major = 0;
  if (cudaGetDevice(&gpu) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu) != cudaSuccess) return false;
  return major == 9 && (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && p.kv_len > 0 &&
         copy_engine_reads(device::query_box(p, p.q, p.q_strides)) &&
         copy_engine_reads(device::query_box(p, p.out, p.out_strides)) &&
         copy_engine_reads(device::key_box(p, p.k, p.k_strides, 1)) &&
         copy_engine_reads(device::key_box(p, p.v, p.v_strides, 1));
}

const char* forward_sm90(const AttentionForwardParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = p.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16>(p, cuda_stream)
                                                         : device::launch<__half>(p, cuda_stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dflash
