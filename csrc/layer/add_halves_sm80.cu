// The halves B of a LoRA adapter, added to a product whose rows have passed the halves A: product += inner @ halves^T.
// With a gate, the result is the middle of a gated MLP.
//
// A warp takes 16 rows, and a block 64 rows and some columns. Nothing is kept in shared memory: a sum may take its
// terms, and a fragment its columns, in any order, so every thread reads what it needs of a row in pieces of 16 bytes.
// All loads are under way before the first is waited for, and those of the halves before the previous kernel has ended.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "common/mma.h"
#include "layer/activation.h"
#include "layer/launch.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 128, kRows = 64;

constexpr int columns_of(int rank) { return rank > 64 ? 16 : 32; }  // of a block, as many as the registers hold

template <int kWords>
DFLASH_INLINE void read(uint32_t (&to)[kWords], const void* from) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 x = static_cast<const uint4*>(from)[i];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  } else {
    static_assert(kWords == 2);
    const uint2 x = *static_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  }
}

template <int kWords>
DFLASH_INLINE void write(void* to, const uint32_t (&from)[kWords]) {
  if constexpr (kWords == 4) {
    *static_cast<uint4*>(to) = {from[0], from[1], from[2], from[3]};
  } else {
    static_assert(kWords == 2);
    *static_cast<uint2*>(to) = {from[0], from[1]};
  }
}

// What a warp adds up: 16 rows and columns_of(kRank) columns. Thread 4 g + t has rows g and g + 8, and kSize columns
// from t * kSize on. Of a row of inner or of the halves it reads the t-th quarter.
template <class T, int kRank>
struct Part {
  static constexpr int kColumns = columns_of(kRank), kSize = kColumns / 4, kTiles = kColumns / 8;
  static constexpr int kQuarter = kRank / 8;  // words
  uint32_t halves[kTiles][kQuarter], inner[2][kQuarter], product[2][kSize / 2];

  DFLASH_INLINE void read_halves(const AddHalvesParams& p, int64_t column) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      // Column g of tile j of the product is the one that thread g / 2 of the four has there.
      const int64_t row = column + g / 2 * kSize + 2 * j + g % 2;
      read(halves[j], static_cast<const T*>(p.halves) + row * kRank + t * (kRank / 4));
    }
  }

  DFLASH_INLINE void read_row(const AddHalvesParams& p, int r, int64_t row, int64_t column, bool has_adapter) {
    const int t = threadIdx.x % 4;
    read(product[r], static_cast<const T*>(p.product) + row * p.stride + column + t * kSize);
    if (!has_adapter) return;
    const int64_t at = column < p.ends[0] ? p.inner_at[0] : column < p.ends[1] ? p.inner_at[1] : p.inner_at[2];
    read(inner[r], static_cast<const T*>(p.inner) + row * p.inner_stride + at + t * (kRank / 4));
  }

  // Calls store(r, c, word) with the rounded sums in row r of the thread's two, in its columns 2 c and 2 c + 1.
  template <class Store>
  DFLASH_INLINE void add(const bool (&has_adapter)[2], Store&& store) const {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float sums[4] = {};
#pragma unroll
      for (int s = 0; s < kQuarter / 2; ++s) {
        const uint32_t a[4] = {inner[0][2 * s], inner[1][2 * s], inner[0][2 * s + 1], inner[1][2 * s + 1]};
        mma_m16n8k16<T>(sums, a, halves[j][2 * s], halves[j][2 * s + 1]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x, y;
        unpack<T>(x, y, product[r][j]);
        if (has_adapter[r]) x += sums[2 * r], y += sums[2 * r + 1];
        store(r, j, pack<T>(x, y));
      }
    }
  }
};

template <class T, int kRank, bool kGated>
__global__ void __launch_bounds__(kThreads) add_halves_sm80(const __grid_constant__ AddHalvesParams p) {
  using Piece = Part<T, kRank>;
  constexpr int kParts = kGated ? 2 : 1, kWords = Piece::kSize / 2;
  const int width = static_cast<int>(p.width) / kParts, tiles = width / Piece::kColumns;
  const int row_tile = static_cast<int>(blockIdx.x) / tiles;
  const int column = (static_cast<int>(blockIdx.x) - row_tile * tiles) * Piece::kColumns;
  Piece parts[kParts];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  launch_dependents();
#endif
#pragma unroll
  for (int i = 0; i < kParts; ++i) parts[i].read_halves(p, column + i * width);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  wait_for_previous_kernel();
#endif
  const int rows = static_cast<int>(p.rows), entry_rows = static_cast<int>(p.entry_rows);
  const int first = row_tile * kRows + static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  bool exists[2], has_adapter[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + 8 * r;
    exists[r] = row < rows;
    has_adapter[r] = exists[r] && row % entry_rows >= p.first;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (uint32_t& word : parts[i].inner[r]) word = 0;
      if (exists[r]) parts[i].read_row(p, r, row, column + i * width, has_adapter[r]);
    }
  }
  uint32_t results[2][kWords];
  parts[0].add(has_adapter, [&](int r, int c, uint32_t sums) { results[r][c] = sums; });
  if constexpr (kGated) {
    parts[1].add(has_adapter, [&](int r, int c, uint32_t sums) {
      float x, y, up_x, up_y;
      unpack<T>(x, y, results[r][c]);
      unpack<T>(up_x, up_y, sums);
      // The activation is rounded before the product, as in the model's own modules.
      unpack<T>(x, y, pack<T>(activated<float>(p.activation, x), activated<float>(p.activation, y)));
      results[r][c] = pack<T>(x * up_x, y * up_y);
    });
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first + 8 * r, at = column + static_cast<int>(threadIdx.x) % 4 * Piece::kSize;
    if constexpr (kGated) {
      if (exists[r]) write(static_cast<T*>(p.out) + row * width + at, results[r]);
    } else {
      if (has_adapter[r]) write(static_cast<T*>(p.product) + row * p.stride + at, results[r]);
    }
  }
}

template <class T, int kRank>
cudaError_t launch_add_halves(const AddHalvesParams& p, cudaStream_t stream) {
  const int64_t row_tiles = (p.rows + kRows - 1) / kRows, columns = p.width / (p.out != nullptr ? 2 : 1);
  const LaunchShape shape{.blocks = row_tiles * (columns / columns_of(kRank)), .threads = kThreads};
  return p.out != nullptr ? launch_layer_kernel(add_halves_sm80<T, kRank, true>, shape, stream, p)
                          : launch_layer_kernel(add_halves_sm80<T, kRank, false>, shape, stream, p);
}

}  // namespace
}  // namespace device

const char* add_halves_sm80(const AddHalvesParams& params, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    switch (params.rank) {
      case 16: return device::launch_add_halves<T, 16>(params, stream);
      case 32: return device::launch_add_halves<T, 32>(params, stream);
      case 64: return device::launch_add_halves<T, 64>(params, stream);
      case 128: return device::launch_add_halves<T, 128>(params, stream);
      default: return cudaErrorInvalidValue;
    }
  });
}

}  // namespace dflash
