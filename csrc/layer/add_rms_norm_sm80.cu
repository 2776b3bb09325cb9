// Adds to the residual stream and normalises it, with one block a row, or one warp a row where rows are short. The row
// stays in shared memory between its two reads.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256, kWarpWidth = 1024;  // a warp takes rows of this width and less

struct Sum {
  float value = 0;
  DFLASH_INLINE void merge(const Sum& other) { value += other.value; }
};

// kRowThreads is 32, or all threads of the block.
template <class T, int kRowThreads>
struct NormedRow {
  static constexpr int kSize = Chunk<T>::kSize;
  const AddRmsNormParams& p;
  float* row;  // shared memory
  const bool aligned;

  // Calls f(index) with the places of this thread's chunks in the row.
  template <class F>
  DFLASH_INLINE void for_each_chunk(F&& f) const {
    for (int i = threadIdx.x % kRowThreads * kSize; i < p.width; i += kRowThreads * kSize) f(i);
  }

  // The factor that the norm multiplies all values by.
  DFLASH_INLINE float scale(float squares) const {
    if constexpr (kRowThreads == 32) {
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) squares += __shfl_xor_sync(~0u, squares, mask);
    } else {
      squares = block_merge<kThreads>(Sum{squares}).value;
    }
    return rsqrtf(squares / p.width + float(p.eps));
  }

  DFLASH_INLINE void weight(float (&w)[kSize], const void* norm, int i) const {
    load(w, static_cast<const T*>(norm) + i, aligned);
    const float one = p.plus_one ? 1.f : 0.f;
#pragma unroll
    for (int k = 0; k < kSize; ++k) w[k] += one;
  }

  DFLASH_INLINE void run(int64_t which) const {
    const int64_t start = which * p.width;
    const T* residual = static_cast<const T*>(p.residual) + start;
    T* total = static_cast<T*>(p.total) + start;
    float update_scale = 1;
    if (p.update_norm) {
      const T* update = static_cast<const T*>(p.update) + start;
      float squares = 0;
      for_each_chunk([&](int i) {
        float x[kSize];
        load(x, update + i, aligned);
#pragma unroll
        for (int k = 0; k < kSize; ++k) squares += x[k] * x[k];
      });
      update_scale = scale(squares);
    }
    float squares = 0;
    for_each_chunk([&](int i) {
      float x[kSize];
      load(x, residual + i, aligned);
      if (p.update) {
        float u[kSize], w[kSize];
        load(u, static_cast<const T*>(p.update) + start + i, aligned);
        if (p.update_norm) weight(w, p.update_norm, i);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          // The sum is that of rounded numbers, as in the model's own modules.
          const float added = p.update_norm ? to_float(from_float<T>(u[k] * update_scale * w[k])) : u[k];
          x[k] = to_float(from_float<T>(x[k] + added));
        }
        store(total + i, x, aligned);
      }
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        squares += x[k] * x[k];
        row[i + k] = x[k];
      }
    });
    const float row_scale = scale(squares);
    for_each_chunk([&](int i) {
      float x[kSize], w[kSize];
      weight(w, p.norm, i);
#pragma unroll
      for (int k = 0; k < kSize; ++k) x[k] = row[i + k] * row_scale * w[k];
      store(static_cast<T*>(p.out) + start + i, x, aligned);
    });
  }
};

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kThreads) add_rms_norm_sm80(const AddRmsNormParams params) {
  extern __shared__ __align__(16) float rows[];
  overlap_with_neighbours();
  const int of_block = threadIdx.x / kRowThreads;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kRowThreads) + of_block;
  if (row >= params.rows) return;
  const bool aligned = is_aligned(params.residual) && is_aligned(params.total) && is_aligned(params.norm) &&
                       is_aligned(params.out) && is_aligned(params.update) && is_aligned(params.update_norm);
  NormedRow<T, kRowThreads>{params, rows + of_block * params.width, aligned}.run(row);
}

template <class T, int kRowThreads>
cudaError_t launch_add_rms_norm(const AddRmsNormParams& params, cudaStream_t stream) {
  constexpr int kRows = kThreads / kRowThreads;
  LaunchShape shape{.blocks = (params.rows + kRows - 1) / kRows, .threads = kThreads,
                    .shared_bytes = static_cast<int>(kRows * params.width * sizeof(float))};
  return launch_layer_kernel(add_rms_norm_sm80<T, kRowThreads>, shape, stream, params);
}

}  // namespace
}  // namespace device

const char* add_rms_norm_sm80(const AddRmsNormParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    if (params.width <= device::kWarpWidth) return device::launch_add_rms_norm<T, 32>(params, stream);
    return device::launch_add_rms_norm<T, device::kThreads>(params, stream);
  });
}

}  // namespace dflash
