// Products of few rows with a large weight on Hopper, at the speed at which memory delivers the weight.
//
// A block computes a tile of columns (rows of the weight) for a tile of rows of x over one slice of the inner dimension.
// The blocks of a cluster share a tile; each sums a part of it over all slices, in order, from the shared memory of the
// others. How the inner dimension is cut depends on the weight's shape alone. So a row's bits depend neither on the
// number of rows nor on its place among them. A tile has all rows of x, up to 128, but few rows where the weight is
// small, because reading it several times then takes less time than a block with many rows.
//
// With an RMS norm, x is multiplied by the norm's weights before the product and by 1 / rms behind it. A slice's sum of
// squares is added to the others' as its products are.
#include "common/cluster.h"
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "common/gpu.h"
#include "common/mma.h"
#include "common/named_barrier.h"
#include "common/tensor_map.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "linear/kernels.h"

namespace dflash {
namespace device {
namespace {

constexpr int kMostSlices = 8;

struct LinearLaunch {
  CUtensorMap weight, x;
  LinearParams params;
  int blocks;     // of the inner dimension, kPanelColumns each
  int row_tiles;  // of x
};

// A tile of 64 columns and up to kTokens rows of x. Three blocks fit on a multiprocessor, or one with kIsAlone, which
// has twice as many stages: one block with few stages waits for the memory.
template <int kTokens, bool kIsAlone>
struct LinearTiling {
  static constexpr int kColumns = 64, kHalf = kColumns / 2;
  static constexpr int kConsumers = 128, kThreads = kConsumers + 32, kBlocksAtOnce = kIsAlone ? 1 : 3;
  static constexpr int kWeightBytes = kColumns * kPanelRowBytes, kStageBytes = kWeightBytes + kTokens * kPanelRowBytes;
  static constexpr int kStages = (kIsAlone ? 2 : 1) * 73728 / kStageBytes;
  // The sums of a row of x, in floats. Four more than 64, so that no two lanes share a bank.
  static constexpr int kSumsStride = kColumns + 4;
  static_assert(kTokens * kSumsStride * 4 <= kStages * kStageBytes, "the sums take the place of the stages");
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;
};

template <class T, int kTokens, bool kIsAlone>
struct LinearTile {
  using Tiling = LinearTiling<kTokens, kIsAlone>;
  static constexpr int kStages = Tiling::kStages;

  const LinearLaunch& launch;
  const LinearParams& p;
  Ring<kStages>& ring;
  float* const squares;   // [kTokens] in shared memory: the slice's sums, if there is a norm
  const uint32_t stages;  // in shared memory
  const int rank, slices, first, first_row, begin, count;

  DFLASH_INLINE LinearTile(const LinearLaunch& launch, Ring<kStages>& ring, float* squares, uint32_t stages)
      : launch(launch), p(launch.params), ring(ring), squares(squares), stages(stages), rank(cluster_rank()), slices(cluster_size()),
        first(blockIdx.x / slices / launch.row_tiles * (p.gate == Gate::kNone ? Tiling::kColumns : Tiling::kHalf)),
        first_row(blockIdx.x / slices % launch.row_tiles * kTokens), begin(launch.blocks * rank / slices),
        count(launch.blocks * (rank + 1) / slices - begin) {}

  DFLASH_INLINE uint32_t stage_address(int index) const { return stages + index * Tiling::kStageBytes; }

  // A tile's second half are the columns behind the gate, if there is one.
  DFLASH_INLINE void load_weight(int index, int block) const {
    const int column = (begin + block) * kPanelColumns;
    const int second = int(p.gate == Gate::kNone ? first + Tiling::kHalf : p.columns + first);
    ring.full[index].arrive_and_expect_tx(Tiling::kStageBytes);
    tma_load(stage_address(index), launch.weight, column, first, 0, 0, ring.full[index]);
    tma_load(stage_address(index) + Tiling::kWeightBytes / 2, launch.weight, column, second, 0, 0, ring.full[index]);
  }
  DFLASH_INLINE void load_x(int index, int block) const {
    tma_load(stage_address(index) + Tiling::kWeightBytes, launch.x, (begin + block) * kPanelColumns, first_row, 0, 0,
             ring.full[index]);
  }

  DFLASH_INLINE void produce() const {
    const int ahead = count < kStages ? count : kStages;
    if (!p.weight_is_constant) wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) load_weight(i, i);
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) load_x(i, i);
    Stage<kStages> stage;
    for (int i = kStages; i < count; ++i) {
      ring.empty[stage.index].wait(stage.parity);
      load_weight(stage.index, i);
      load_x(stage.index, i);
      stage.advance();
    }
  }

  // Multiplies the slice, and leaves the sums in the place of the stages: [kTokens, kSumsStride] floats.
  DFLASH_INLINE void consume() const {
    const int lane = threadIdx.x % 32;
    float sums[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0;
    RowScaler scaler(*this);
    Stage<kStages> stage;
    for (int i = 0; i < count; ++i) {
      ring.full[stage.index].wait(stage.parity);
      if (p.norm != nullptr) {
        scaler.scale(stage_address(stage.index) + Tiling::kWeightBytes, i);
        named_barrier_sync(1, Tiling::kConsumers);
      }
      const uint32_t at = uniform(stage_address(stage.index));
      const uint64_t weight = k_major_descriptor(at);
      const uint64_t x = k_major_descriptor(at + Tiling::kWeightBytes);
      fence_accumulator(sums);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kPanelColumns / 16; ++step) {
        Wgmma<T, kTokens>::template ss<kMajorK, kMajorK>(sums, weight + 2 * step, x + 2 * step, true);
      }
      wgmma_commit_group();
      wgmma_wait_group<0>();
      fence_accumulator(sums);
      if (lane == 0) ring.empty[stage.index].arrive();
      stage.advance();
    }
    if (p.norm != nullptr) scaler.store_squares();
    named_barrier_sync(1, Tiling::kConsumers);
    const int row = threadIdx.x / 32 * 16 + lane / 4, token = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int place = (token + accumulator_column(i)) * Tiling::kSumsStride + row + 8 * accumulator_row(i);
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(stages + 4 * place), "f"(sums[i]) : "memory");
    }
  }

  // Multiplies x by the norm's weights in shared memory. A thread takes chunk threadIdx.x % 8 of 8 columns of every
  // panel, of the same few rows, and adds up their squares.
  struct RowScaler {
    static constexpr int kRows = (kTokens * 8 + Tiling::kConsumers - 1) / Tiling::kConsumers;
    static constexpr int kRowStep = Tiling::kConsumers / 8;

    const LinearTile& tile;
    const int chunk, first_row;
    float squares[kRows];
    Chunk<T> gain;  // of the next panel, loaded early

    DFLASH_INLINE explicit RowScaler(const LinearTile& tile)
        : tile(tile), chunk(threadIdx.x % 8), first_row(threadIdx.x / 8) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) squares[i] = 0;
      load_gain(0);
    }

    DFLASH_INLINE void load_gain(int block) {
      const int column = (tile.begin + block) * kPanelColumns + chunk * 8;
      gain = {};
      if (tile.p.norm == nullptr || block >= tile.count || column >= tile.p.inner) return;
      gain = *reinterpret_cast<const Chunk<T>*>(static_cast<const T*>(tile.p.norm) + column);
    }

    DFLASH_INLINE void scale(uint32_t panel, int block) {
      const float one = tile.p.norm_plus_one ? 1.0f : 0.0f;
      float factors[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) factors[k] = to_float(gain.values[k]) + one;
      load_gain(block + 1);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first_row + i * kRowStep;
        if (kRows * Tiling::kConsumers > kTokens * 8 && row >= kTokens) break;
        const uint32_t at = panel + row * kPanelRowBytes + ((chunk ^ (row % 8)) * 16);  // the 128-byte swizzle
        uint4 packed = read_shared(at);
        auto* pairs = reinterpret_cast<uint32_t*>(&packed);
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
          T two[2];
          memcpy(two, &pairs[k / 2], 4);
          const float low = to_float(two[0]), high = to_float(two[1]);
          squares[i] += low * low;
          squares[i] += high * high;
          pairs[k / 2] = pack<T>(low * factors[k], high * factors[k + 1]);
        }
        write_shared(at, packed);
      }
      fence_proxy_async();
    }

    DFLASH_INLINE void store_squares() {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first_row + i * kRowStep;
#pragma unroll
        for (int mask = 4; mask > 0; mask >>= 1) squares[i] += __shfl_xor_sync(~0u, squares[i], mask);
        if (chunk == 0 && row < kTokens) tile.squares[row] = squares[i];
      }
    }
  };

  // 1 / rms of a row of x, or 1 without a norm.
  DFLASH_INLINE float scale_of(int token) const {
    if (p.norm == nullptr) return 1;
    float sum = 0;
    const uint32_t place = shared_address(squares + token);
    for (int slice = 0; slice < slices; ++slice) sum += read_remote(map_to_rank(place, slice));
    return rsqrtf(sum / float(p.inner) + float(p.norm_eps));
  }

  // The sums of eight neighbouring columns over all slices, in order, times `scale`.
  DFLASH_INLINE void add_slices(float (&y)[8], int token, int column, float scale) const {
    const uint32_t place = stages + 4 * (token * Tiling::kSumsStride + column);
    float4 parts[2][kMostSlices];
#pragma unroll
    for (int slice = 0; slice < kMostSlices; ++slice) {
      if (slice >= slices) break;
      const uint32_t remote = map_to_rank(place, slice);
      parts[0][slice] = read_remote_v4(remote);
      parts[1][slice] = read_remote_v4(remote + 16);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) y[k] = 0;
#pragma unroll
    for (int slice = 0; slice < kMostSlices; ++slice) {
      if (slice >= slices) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 part = parts[half][slice];
        float* sums = y + 4 * half;
        sums[0] += part.x, sums[1] += part.y, sums[2] += part.z, sums[3] += part.w;
      }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) y[k] *= scale;
  }

  // activation(y) / y
  DFLASH_INLINE float gate_of(float y) const {
    if (p.gate == Gate::kSilu) return 1 / (1 + __expf(-y));
    return 1 / (1 + __expf(-2 * 0.7978845608028654f * y * (1 + 0.044715f * y * y)));
  }

  // Bias, gate and residual of the block's part of the tile, and the store.
  DFLASH_INLINE void finish() const {
    const int columns = p.gate == Gate::kNone ? Tiling::kColumns : Tiling::kHalf;
    const int chunks_of_row = columns / 8;
    const bool aligned = p.columns % 8 == 0;
    const T *bias = static_cast<const T*>(p.bias), *residual = static_cast<const T*>(p.residual);
    const int rows = int(p.rows) - first_row < kTokens ? int(p.rows) - first_row : kTokens;
    // The rows of x go round the blocks of the cluster.
    for (int i = threadIdx.x;; i += Tiling::kThreads) {
      const int token = i / chunks_of_row * slices + rank, column = i % chunks_of_row * 8;
      if (token >= rows) break;
      const int64_t left = p.columns - first - column;
      if (left <= 0) continue;
      const float scale = scale_of(token);
      float y[8];
      add_slices(y, token, column, scale);
      if (bias != nullptr) add(y, bias + first + column, left, aligned);
      if (p.gate != Gate::kNone) {
        float up[8];
        add_slices(up, token, column + Tiling::kHalf, scale);
        if (bias != nullptr) add(up, bias + p.columns + first + column, left, aligned);
#pragma unroll
        for (int k = 0; k < 8; ++k) y[k] = y[k] * gate_of(y[k]) * up[k];
      }
      const int64_t place = (first_row + token) * p.columns + first + column;
      if (residual != nullptr) add(y, residual + place, left, aligned);
      T* out = static_cast<T*>(p.out) + place;
      if (left >= 8) {
        store<8>(out, y, aligned && is_aligned(out));
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (k < left) out[k] = from_float<T>(y[k]);
        }
      }
    }
  }

  // y += the first `left` of eight values
  DFLASH_INLINE static void add(float (&y)[8], const T* values, int64_t left, bool aligned) {
    float x[8];
    if (left >= 8) {
      load<8>(x, values, aligned && is_aligned(values));
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = k < left ? to_float(values[k]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) y[k] += x[k];
  }
};

template <class T, int kTokens, bool kIsAlone>
__global__ void __launch_bounds__(LinearTiling<kTokens, kIsAlone>::kThreads,
                                  LinearTiling<kTokens, kIsAlone>::kBlocksAtOnce)
    linear_sm90(const __grid_constant__ LinearLaunch launch) {
  using Tile = LinearTile<T, kTokens, kIsAlone>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Ring<Tile::kStages> ring;
  __shared__ float squares[kTokens];
  const Tile tile(launch, ring, squares, (shared_address(dynamic) + 1023) & ~1023u);
  if (threadIdx.x == 0) {
    ring.init(Tile::Tiling::kConsumers / 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  launch_dependents();
  if (threadIdx.x >= Tile::Tiling::kConsumers) {
    if (threadIdx.x % 32 == 0) tile.produce();
    __syncwarp();
  } else {
    tile.consume();
  }
  wait_for_previous_kernel();
  cluster_arrive();
  cluster_wait();
  tile.finish();
  // A block's shared memory must stay until the others have read it.
  cluster_arrive_relaxed();
  cluster_wait();
}

TensorBox rows_of(const void* data, int64_t rows, int64_t inner, int64_t box) {
  return {data, {inner, rows, 1, 1}, {1, inner, inner, inner}, {kPanelColumns, box, 1, 1}};
}

constexpr int64_t kMultiprocessors = 132;  // of an H100

// A small weight takes little time to read. It has less than 1,024 panels of 64 x 64 elements, 8 MB in all.
bool is_small(int64_t tiles, int64_t blocks) { return tiles * blocks < 1024; }

int64_t blocks_of(const LinearParams& p) { return (p.inner + kPanelColumns - 1) / kPanelColumns; }
int64_t weight_rows_of(const LinearParams& p) { return p.gate == Gate::kNone ? p.columns : 2 * p.columns; }
int64_t tiles_of(const LinearParams& p) { return (weight_rows_of(p) + 63) / 64; }

// Into how many slices the inner dimension is cut, which depends on the shape of the weight alone: the fewest that
// spread the blocks evenly over an H100's multiprocessors, three on each at most. A small weight is cut into 64 blocks
// or more.
int64_t slices_of(int64_t tiles, int64_t blocks) {
  const int64_t most = std::min<int64_t>(blocks, kMostSlices);
  if (is_small(tiles, blocks)) return std::min(most, (63 + tiles) / tiles);
  int64_t best = 1;
  double best_share = 0;
  for (int64_t slices = 1; slices <= most; ++slices) {
    const int64_t turns = (tiles * slices + kMultiprocessors - 1) / kMultiprocessors;
    if (slices > 1 && turns > 3) break;
    const double share = double(tiles * slices) / double(turns * kMultiprocessors);
    if (share > best_share + 0.05) best = slices, best_share = share;
  }
  return best;
}

template <class T, int kTokens, bool kIsAlone>
cudaError_t launch_linear(const LinearParams& params, int64_t slices, cudaStream_t stream) {
  using Tiling = LinearTiling<kTokens, kIsAlone>;
  const int64_t row_tiles = (params.rows + kTokens - 1) / kTokens;
  LinearLaunch launch{.params = params, .blocks = int(blocks_of(params)), .row_tiles = int(row_tiles)};
  const cudaError_t status = make_tensor_maps(
      params.dtype, {{&launch.weight, rows_of(params.weight, weight_rows_of(params), params.inner, Tiling::kHalf)},
                     {&launch.x, rows_of(params.x, params.rows, params.inner, kTokens)}});
  if (status != cudaSuccess) return status;
  const LaunchShape shape{.blocks = tiles_of(params) * slices * row_tiles,
                          .threads = Tiling::kThreads,
                          .shared_bytes = Tiling::kSharedBytes,
                          .cluster_size = int(slices),
                          .overlaps_previous = true};
  return launch_kernel(linear_sm90<T, kTokens, kIsAlone>, shape, stream, launch);
}

}  // namespace
}  // namespace device

bool linear_sm90_serves(const LinearParams& params) {
  const bool is_half = params.dtype == DType::kBFloat16 || params.dtype == DType::kFloat16;
  return hopper_kernels_serve() && is_half && params.inner % 8 == 0 &&
         (reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight) |
          reinterpret_cast<uintptr_t>(params.norm)) % 16 == 0;
}

const char* linear_sm90(const LinearParams& params, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t rows = params.rows, tiles = device::tiles_of(params), blocks = device::blocks_of(params);
    const int64_t slices = device::slices_of(tiles, blocks);
    if (device::is_small(tiles, blocks)) {
      return rows <= 32 ? device::launch_linear<T, 16, false>(params, slices, stream)
                        : device::launch_linear<T, 32, false>(params, slices, stream);
    }
    if (rows <= 16) return device::launch_linear<T, 16, false>(params, slices, stream);
    if (rows <= 32) return device::launch_linear<T, 32, false>(params, slices, stream);
    if (rows <= 64) return device::launch_linear<T, 64, false>(params, slices, stream);
    // A multiprocessor may have one block alone.
    return tiles * slices <= device::kMultiprocessors ? device::launch_linear<T, 128, true>(params, slices, stream)
                                                      : device::launch_linear<T, 128, false>(params, slices, stream);
  });
}

}  // namespace dflash
