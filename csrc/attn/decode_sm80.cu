// Decode attention: few rows, many keys, bound by the memory that the cache lies in. A persistent grid walks through the
// work of decode_work.h. Key tiles stream through a ring in shared memory that runs on from one item into the next; of
// a tile's 64 rows each warp has 16, and keeps their output in registers.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "attn/decode_combine.h"
#include "attn/decode_work.h"
#include "attn/softmax.h"
#include "common/mma.h"

namespace dflash {
namespace device {
namespace {

constexpr int kMaxStages = 4;

// How a tile is cut, given the head dimension: two warps share 16 rows where one could not hold their output.
template <int kDim>
struct DecodeTile {
  static constexpr int kKeys = kDim <= 128 ? 64 : 8192 / kDim;
  static constexpr int kColumnWarps = kDim <= 256 ? 1 : 2;
  static constexpr int kColumns = kDim / kColumnWarps;
  static constexpr int kWarps = kDecodeRows / 16 * kColumnWarps, kThreads = kWarps * 32;
  static constexpr int kBlocks = kDim <= 64 ? 3 : kDim <= 256 ? 2 : 1;  // on a multiprocessor
  static constexpr int kChunks = kDim / 8;                              // of 16 bytes, in a row
  static constexpr int kRowBytes = kDim * 2, kQueryBytes = kDecodeRows * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes, kStageBytes = 2 * kKeyBytes;  // keys, then values
};

// What a block keeps in shared memory beside queries, keys and values.
template <class Tile>
struct DecodeState {
  Share::Scratch<Tile::kWarps> scratch;
  Walk<Tile::kKeys> walk;
  static constexpr int kSteps = kMaxStages + 2;  // those under way, the one at hand, and the one after
  Step steps[kSteps];                            // step i in place i % kSteps
};

template <class T, int kDim>
struct Decoder : DecodeTile<kDim> {
  using Tile = DecodeTile<kDim>;
  using State = DecodeState<Tile>;
  using Tile::kChunks, Tile::kColumns, Tile::kColumnWarps, Tile::kKeys, Tile::kRowBytes, Tile::kThreads, Tile::kWarps;

  const DecodeProblem& p;
  State& state;
  const Scores scores;
  const uint32_t queries, ring;  // in shared memory
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp / kColumnWarps * 16, first_column = warp % kColumnWarps * kColumns;

  // Of the item at hand: the bounds of the thread's two rows, and what their keys have given so far.
  RowBounds bounds[2];
  OnlineSoftmax softmax;
  float o[kColumns / 8][4];

  DFLASH_INLINE Decoder(const DecodeProblem& problem, uint8_t* shared)
      : p(problem),
        state(*reinterpret_cast<State*>(shared + Tile::kQueryBytes + p.stages * Tile::kStageBytes)),
        scores(problem),
        queries(shared_address(shared)),
        ring(queries + Tile::kQueryBytes) {}

  DFLASH_INLINE void clear() {
    softmax = OnlineSoftmax();
#pragma unroll
    for (auto& values : o) {
#pragma unroll
      for (float& value : values) value = 0;
    }
  }

  // Chunk c of row r lies in place c ^ r % 8 of its row, so that a chunk of eight neighbouring rows is in all banks.
  // Tiles begin at multiples of kRowBytes: chunk c ^ 2i of the same row is at the same address ^ 32i.
  static DFLASH_INLINE uint32_t place(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 16; }

  DFLASH_INLINE uint32_t keys_at(int stage) const { return ring + stage * Tile::kStageBytes; }
  DFLASH_INLINE uint32_t values_at(int stage) const { return keys_at(stage) + Tile::kKeyBytes; }

  // 16 bytes of a row.
  DFLASH_INLINE uint4 read(const T* from) const {
    if (p.is_aligned) return *reinterpret_cast<const uint4*>(from);
    alignas(16) T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = from[i];
    return *reinterpret_cast<const uint4*>(values);
  }

  static DFLASH_INLINE void write(uint32_t shared, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
  }

  static DFLASH_INLINE uint4 read_shared(uint32_t shared) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared)
                 : "memory");
    return value;
  }

  // Starts copying; zeros where there is nothing.
  DFLASH_INLINE void copy(uint32_t shared, const T* from, bool exists) const {
    if (p.is_aligned) {
      copy_async(shared, from, exists ? 16 : 0);
    } else {
      write(shared, exists ? read(from) : uint4{});
    }
  }

  // Starts copying a tile of keys and values. Only what some row may see is read.
  DFLASH_INLINE void fetch(const Step& step, int stage) const {
    constexpr int kRows = kKeys / kWarps;
    const ItemRows& rows = step.rows;
    const int first = warp * kRows, head_dim = static_cast<int>(p.head_dim);
    int page = -1, slot = step.key + first + lane % kRows;
    if (step.needs(slot)) {
      page = rows.batch;
      if (p.pages.table) {
        const int size = static_cast<int>(p.pages.page_size);
        page = p.pages.table[rows.batch * p.pages.max_pages + static_cast<unsigned>(slot) / size];
        slot = static_cast<unsigned>(slot) % size;
        if (static_cast<unsigned>(page) >= p.pages.count) page = -1;
      }
    }
    const T* const k = static_cast<const T*>(p.k) + rows.kv_head * p.k_strides.head;
    const T* const v = static_cast<const T*>(p.v) + rows.kv_head * p.v_strides.head;
#pragma unroll
    for (int i = 0; i < kRows * kChunks / 32; ++i) {
      const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
      const int64_t from_page = __shfl_sync(~0u, page, row), from_slot = __shfl_sync(~0u, slot, row);
      const bool exists = from_page >= 0 && chunk * 8 < head_dim;
      const uint32_t at = place(first + row, chunk);
      copy(keys_at(stage) + at,
           exists ? k + from_page * p.k_strides.batch + from_slot * p.k_strides.row + chunk * 8 : k, exists);
      copy(values_at(stage) + at,
           exists ? v + from_page * p.v_strides.batch + from_slot * p.v_strides.row + chunk * 8 : v, exists);
    }
  }

  DFLASH_INLINE void begin(const ItemRows& rows) {
#pragma unroll 4
    for (int i = threadIdx.x; i < kDecodeRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool exists = chunk * 8 < p.head_dim && rows.has(row);
      const T* const from = static_cast<const T*>(p.q) + (exists ? rows.offset(p.q_strides, row) + chunk * 8 : 0);
      write(queries + place(row, chunk), exists ? read(from) : uint4{});
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + lane / 4 + 8 * r;
      bounds[r] = rows.has(row)
                      ? RowBounds(p.mask, rows.batch, rows.position(row), static_cast<int>(p.kv_len))
                      : RowBounds();
    }
    clear();
  }

  DFLASH_INLINE void multiply_keys(float (&s)[kKeys / 2], int stage) const {
#pragma unroll
    for (float& score : s) score = 0;
    const uint32_t own_queries = queries + place(first_row + lane % 16, lane / 16);
    const uint32_t own_keys = keys_at(stage) + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[4];
      load_matrices(a, own_queries ^ step * 32);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, (own_keys ^ step * 32) + n * 16 * kRowBytes);
        auto* const pair = reinterpret_cast<float(*)[4]>(s + 8 * n);
        multiply<T>(pair[0], a, b[0], b[1]);
        multiply<T>(pair[1], a, b[2], b[3]);
      }
    }
  }

  DFLASH_INLINE void add_values(const float (&s)[kKeys / 2], int stage) {
    const uint32_t own_values = values_at(stage) + place(lane % 16, first_column / 8 + lane / 16);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const float* const weights = s + 8 * step;
      const uint32_t a[4] = {pack<T>(weights[0], weights[1]), pack<T>(weights[2], weights[3]),
                             pack<T>(weights[4], weights[5]), pack<T>(weights[6], weights[7])};
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, (own_values ^ n * 32) + step * 16 * kRowBytes);
        multiply<T>(o[2 * n], a, b[0], b[1]);
        multiply<T>(o[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // The halves of a word that are not finite, as ones.
  static DFLASH_INLINE uint32_t not_finite(uint32_t pair) {
    constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c007c00 : 0x7f807f80;
    return __vcmpeq2(pair & kExponent, kExponent);
  }
  static DFLASH_INLINE uint4 not_finite(uint4 v) {
    return {not_finite(v.x), not_finite(v.y), not_finite(v.z), not_finite(v.w)};
  }

  // In a product a value that is not finite spoils all rows, though their weights be zero. So where some rows do not
  // see all keys such values are added to those that do, and zeros take their place.
  DFLASH_INLINE void set_aside(int first_key, int stage) {
    const uint32_t values = values_at(stage);
    bool found = false;
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const uint4 bad = not_finite(read_shared(values + i * 16));
      found |= (bad.x | bad.y | bad.z | bad.w) != 0;
    }
    if (!__syncthreads_or(found)) return;
    for (int key = 0; key < kKeys; ++key) {
      const bool seen[2] = {bounds[0].sees(first_key + key), bounds[1].sees(first_key + key)};
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        uint32_t pair;
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(pair)
                     : "r"(values + place(key, first_column / 8 + n) + lane % 4 * 4)
                     : "memory");
        const uint32_t bad = not_finite(pair);
        if (bad == 0) continue;
        const T* const value = reinterpret_cast<const T*>(&pair);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (bad >> 16 * (i % 2) & 1 && seen[i / 2]) o[n][i] += to_float(value[i % 2]);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const uint4 value = read_shared(values + i * 16), bad = not_finite(value);
      write(values + i * 16, {value.x & ~bad.x, value.y & ~bad.y, value.z & ~bad.z, value.w & ~bad.w});
    }
    __syncthreads();
  }

  DFLASH_INLINE void visit(const Step& step, int stage) {
    const bool has_rows = first_row < step.rows.count();
    float s[kKeys / 2];
    if (has_rows) {
      multiply_keys(s, stage);
      scores(s);
      if (!step.is_full) hide(s, bounds, step.key);
      float correction[2];
      softmax.add(s, scores.factor, correction);
      // What is multiplied by one stays what it is: most tiles bring no larger score.
      if (__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) {
#pragma unroll
        for (auto& values : o) {
#pragma unroll
          for (int i = 0; i < 4; ++i) values[i] *= correction[i / 2];
        }
      }
    }
    if (!step.is_full) set_aside(step.key, stage);
    if (has_rows) add_values(s, stage);
  }

  // Calls store(row, r, column, n) for every pair of neighbours o[n][2 * r] that the output has.
  template <class Store>
  DFLASH_INLINE void for_each_pair(const ItemRows& rows, Store&& store) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + lane / 4 + 8 * r;
      if (!rows.has(row)) continue;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const int column = first_column + n * 8 + lane % 4 * 2;
        if (column < p.head_dim) store(row, r, column, n);
      }
    }
  }

  DFLASH_INLINE void write_out(const ItemRows& rows) {
    float inverse[2], lse[2];
    softmax.finish(scores.factor, inverse, lse);
    for_each_pair(rows, [&](int row, int r, int column, int n) {
      T* const to = static_cast<T*>(p.out) + rows.offset(p.out_strides, row) + column;
      *reinterpret_cast<uint32_t*>(to) = pack<T>(o[n][2 * r] * inverse[r], o[n][2 * r + 1] * inverse[r]);
    });
  }

  DFLASH_INLINE void write_part(const ItemRows& rows, int64_t slot) {
    slot *= kDecodeRows;
    for_each_pair(rows, [&](int row, int r, int column, int n) {
      *reinterpret_cast<float2*>(p.partial_out + (slot + row) * p.head_dim + column) = {o[n][2 * r], o[n][2 * r + 1]};
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int row = first_row + lane / 4 + 8 * r;
      if (first_column == 0 && lane % 4 == 0 && rows.has(row)) {
        p.partial_stats[slot + row] = {softmax.largest[r] * scores.factor, sum};
      }
    }
  }

  // The copies of this many tiles, started last, may still be under way.
  static DFLASH_INLINE void wait_for_all_but(int tiles) {
    switch (tiles) {
      case 0: return wait_for_copies<0>();
      case 1: return wait_for_copies<1>();
      case 2: return wait_for_copies<2>();
      default: return wait_for_copies<3>();
    }
  }

  // Keeps step i for all to read, and goes on.
  DFLASH_INLINE void keep_step(const Share& share, unsigned i) const {
    Step& step = state.steps[i % State::kSteps];
    step = state.walk.step(p);
    if (step.unit < share.end) state.walk.next(p);
  }

  DFLASH_INLINE void run() {
    const Share share = Share::of_block(p, state.scratch);
    if (share.begin == share.end) return;
    const bool is_guide = threadIdx.x == kThreads - 1;
    if (is_guide) {
      state.walk.start(p, share.item, share.begin);
      for (int i = 0; i <= p.stages; ++i) keep_step(share, i);
    }
    __syncthreads();

    const auto step_at = [&](unsigned i) -> const Step& { return state.steps[i % State::kSteps]; };
    const auto fetch_step = [&](unsigned i, int stage) {
      if (step_at(i).unit < share.end) fetch(step_at(i), stage);
      commit_copies();
    };
    for (int i = 0; i + 1 < p.stages; ++i) fetch_step(i, i);

    int stage = 0, last_stage = p.stages - 1;
    bool is_new = true;
    for (unsigned i = 0; step_at(i).unit < share.end; ++i) {
      const Step& step = step_at(i);
      __syncthreads();  // nobody reads the queries or the stage any more that are written next
      fetch_step(i + p.stages - 1, last_stage);
      if (is_new) begin(step.rows);
      wait_for_all_but(p.stages - 1);
      __syncthreads();
      if (is_guide) keep_step(share, i + p.stages + 1);
      visit(step, stage);
      last_stage = stage;
      stage = stage + 1 == p.stages ? 0 : stage + 1;

      is_new = step.ends_item;
      const bool leaves = step.ends_item || (step.ends_unit && step.unit + 1 == share.end);
      if (p.exact && step.ends_unit) {
        write_part(step.rows, step.unit);
        clear();
      } else if (!p.exact && leaves) {
        if (share.holds(step.item)) {
          write_out(step.rows);
        } else {
          write_part(step.rows, 2 * blockIdx.x + share.begins(step.item));
        }
      }
      if (leaves && !share.holds(step.item)) Meeting(p, Parts(p, share, step.item)).arrive();
    }

    // Only now: the others have had all this time to write their parts.
    for (Item item = share.item; item.first < share.end; item.next(p)) {
      if (p.exact || !share.holds(item)) combine<T, kThreads>(p, share, item);
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(DecodeTile<kDim>::kThreads, DecodeTile<kDim>::kBlocks)
    decode(const __grid_constant__ DecodeProblem problem) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Decoder<T, kDim>(problem, shared).run();
}

// What a launch needs, as the current device has it.
struct Grid {
  int blocks, stages, shared_bytes;

  template <class Tile>
  cudaError_t fit() {
    int gpu = 0, processors = 0, per_processor = 0, per_block = 0, reserved = 0;
    cudaError_t status = cudaGetDevice(&gpu);
    const auto read = [&](int& value, cudaDeviceAttr attribute) {
      if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, gpu);
    };
    read(processors, cudaDevAttrMultiProcessorCount);
    read(per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    read(per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    read(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
    if (status != cudaSuccess) return status;
    constexpr int kFixedBytes = Tile::kQueryBytes + sizeof(DecodeState<Tile>);
    for (int resident = Tile::kBlocks; resident > 0; --resident) {
      const int available = std::min(per_block, per_processor / resident - reserved) - kFixedBytes;
      blocks = std::min<int>(processors * resident, kDecodeCounters);
      stages = std::min(available / Tile::kStageBytes, kMaxStages);
      if (stages > 1) break;
    }
    shared_bytes = kFixedBytes + stages * Tile::kStageBytes;
    return stages > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
  }
};

// Calls visit<kDim>() with the smallest tile that holds the head dimension.
template <class Visit>
auto with_dim(int64_t head_dim, Visit&& visit) {
  if (head_dim <= 64) return visit.template operator()<64>();
  if (head_dim <= 128) return visit.template operator()<128>();
  if (head_dim <= 256) return visit.template operator()<256>();
  return visit.template operator()<512>();
}

int64_t replicas_of(const DecodeParams& p) {
  return (p.plan_entries == 1 ? p.batch : 1) * p.kv_heads * decode_head_tiles(p);
}

int64_t plan_tiles_of(const DecodeParams& p) { return p.plan_entries * tiles_of(p.q_len, decode_positions(p)); }

int64_t slots_of(const DecodeParams& p, const Grid& grid) {
  if (!p.exact) return 2 * int64_t(grid.blocks);
  return plan_tiles_of(p) * replicas_of(p) * std::max<int64_t>((p.kv_len + kExactKeys - 1) / kExactKeys, 1);
}

bool is_aligned(const void* data, const HeadStrides& strides) {
  return (reinterpret_cast<uintptr_t>(data) | 2 * (strides.batch | strides.head | strides.row)) % 16 == 0;
}

template <class T, int kDim>
cudaError_t launch(const DecodeParams& params, cudaStream_t stream) {
  using Tile = DecodeTile<kDim>;
  Grid grid{};
  cudaError_t status = grid.fit<Tile>();
  if (status != cudaSuccess) return status;
  DecodeProblem problem{params};
  problem.tiles = static_cast<int>(plan_tiles_of(params));
  problem.replicas = static_cast<int>(replicas_of(params));
  problem.head_tiles = static_cast<int>(decode_head_tiles(params));
  problem.fold = static_cast<int>(decode_fold(params));
  problem.positions = static_cast<int>(decode_positions(params));
  problem.unit_shift = std::countr_zero(static_cast<unsigned>(params.exact ? kExactKeys : Tile::kKeys));
  problem.min_units = params.exact ? 1 : 2;
  problem.stages = grid.stages;
  problem.is_aligned = is_aligned(params.q, params.q_strides) && is_aligned(params.k, params.k_strides) &&
                       is_aligned(params.v, params.v_strides);
  problem.partial_out = static_cast<float*>(params.workspace);
  problem.partial_stats =
      reinterpret_cast<float2*>(problem.partial_out + slots_of(params, grid) * kDecodeRows * params.head_dim);
  status = cudaFuncSetAttribute(decode<T, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {&problem};
  return cudaLaunchCooperativeKernel(decode<T, kDim>, dim3(grid.blocks), dim3(Tile::kThreads), arguments,
                                     grid.shared_bytes, stream);
}

}  // namespace
}  // namespace device

int64_t decode_workspace(const DecodeParams& params) {
  device::Grid grid{};
  device::with_dim(params.head_dim, [&]<int kDim> { return grid.fit<device::DecodeTile<kDim>>(); });
  return device::slots_of(params, grid) * kDecodeRows * (params.head_dim + 2) * sizeof(float);
}

const char* decode_sm80(const DecodeParams& params, void* stream) {
  if (params.batch == 0 || params.heads == 0 || params.q_len == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = device::with_dim(params.head_dim, [&]<int kDim> {
    return params.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16, kDim>(params, cuda_stream)
                                            : device::launch<__half, kDim>(params, cuda_stream);
  });
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dflash
