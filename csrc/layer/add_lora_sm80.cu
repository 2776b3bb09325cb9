// A product of rows and what a LoRA adapter adds to it, with the activation of a gated MLP behind both. The adapter's
// inner dimension is short, so that the kernel is bound by the latency of its loads: all of them are under way at once.
#include <algorithm>

#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "common/mma.h"
#include "layer/activation.h"
#include "layer/launch.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps, kColumns = 32;  // of a block
constexpr int kSlab = 32;           // of the inner dimension, of which a lane loads 8 neighbours
constexpr int kAheadBytes = 4096;   // that a thread asks for at a time

// A warp has 16 rows and 32 columns (with a gate 32 of the gate and the same 32 of the up projection). Sums do not depend
// on the order of the inner dimension, nor a product on the order of its columns. So a lane's operands of a slab are 16
// neighbouring bytes of a row, and its results are 8 neighbouring columns of two rows.
template <class T, bool kGated>
__global__ void __launch_bounds__(kThreads) add_lora_sm80(const __grid_constant__ AddLoraParams p) {
  constexpr int kParts = kGated ? 2 : 1;
  const int lane = threadIdx.x % 32, group = lane / 4, at = lane % 4;
  const int64_t column_blocks = (p.width + kColumns - 1) / kColumns;
  const int64_t first_row = blockIdx.x / column_blocks * kRows + threadIdx.x / 32 * 16;
  const int64_t first_column = blockIdx.x % column_blocks * kColumns;
#if __CUDA_ARCH__ >= 900
  // cp.async.bulk.prefetch.L2: what is asked for arrives while this kernel and those behind it run.
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.ahead_bytes / kAheadBytes;
       i += int64_t(gridDim.x) * kThreads) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(static_cast<const char*>(p.ahead) + i * kAheadBytes),
                 "n"(kAheadBytes));
  }
#endif
  overlap_with_neighbours();
  if (first_row >= p.rows) return;

  const int64_t rows[2] = {first_row + group, first_row + group + 8};
  const int64_t column = first_column + 8 * at;  // the first of this lane's results
  const bool has_columns = column < p.width;
  bool is_adapted[2];
  uint4 products[kParts][2];
  float sums[kParts][4][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    is_adapted[half] = rows[half] < p.rows && rows[half] % p.entry_rows >= p.first;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      products[part][half] = {};
      if (rows[half] < p.rows && has_columns) {
        products[part][half] = *reinterpret_cast<const uint4*>(
            static_cast<const T*>(p.product) + rows[half] * p.product_stride + part * p.width + column);
      }
    }
  }
#pragma unroll 2
  for (int64_t k = 8 * at; k < p.rank; k += kSlab) {
    uint4 a[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half] = {};
      if (is_adapted[half]) {
        a[half] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.inner) + rows[half] * p.inner_stride + k);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Column g of this product is the one at which lane g / 2 of each row keeps number 2 j + g % 2.
        const int64_t row = first_column + 8 * (group / 2) + 2 * j + group % 2;
        uint4 b{};
        if (row < p.width) {
          b = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.up) + (part * p.width + row) * p.rank + k);
        }
        mma_m16n8k16<T>(sums[part][j], {a[0].x, a[1].x, a[0].y, a[1].y}, b.x, b.y);
        mma_m16n8k16<T>(sums[part][j], {a[0].z, a[1].z, a[0].w, a[1].w}, b.z, b.w);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (rows[half] >= p.rows || !has_columns) continue;
    float x[kParts][8], out[8];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint4 words = products[part][half];
      unpack<T>(x[part][0], x[part][1], words.x), unpack<T>(x[part][2], x[part][3], words.y);
      unpack<T>(x[part][4], x[part][5], words.z), unpack<T>(x[part][6], x[part][7], words.w);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[part][k] = to_float(from_float<T>(x[part][k] + sums[part][k / 2][2 * half + k % 2]));
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      out[k] = x[0][k];
      // The activation is rounded before the product, as in `gated`.
      if constexpr (kGated) out[k] = to_float(from_float<T>(activated<float>(p.activation, x[0][k]))) * x[1][k];
    }
    store(static_cast<T*>(p.out) + rows[half] * p.width + column, out, true);
  }
}

}  // namespace
}  // namespace device

const char* add_lora_sm80(const AddLoraParams& params, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t columns = (params.width + device::kColumns - 1) / device::kColumns;
    const int64_t rows = (params.rows + device::kRows - 1) / device::kRows;
    const LaunchShape shape{.blocks = columns * rows, .threads = device::kThreads};
    const auto kernel = params.is_gated ? device::add_lora_sm80<T, true> : device::add_lora_sm80<T, false>;
    return launch_layer_kernel(kernel, shape, stream, params);
  });
}

}  // namespace dflash
