// Adds to the residual stream and normalises it. A warp takes a short row, and a block a longer one. They keep it in
// registers, and all of its loads are under way before the first of them is waited for. A row that is too long for that
// stays in a block's shared memory between its two reads.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 512, kShortRows = 4;  // of a block: its threads, or its short rows

struct Sum {
  float value = 0;
  DFLASH_INLINE void merge(const Sum& other) { value += other.value; }
};

template <class T>
struct LongRow {
  static constexpr int kSize = Chunk<T>::kSize;
  const AddRmsNormParams& p;
  float* row;  // shared memory
  const bool aligned;

  // Calls f(index) with the places of this thread's chunks in the row.
  template <class F>
  DFLASH_INLINE void for_each_chunk(F&& f) const {
    for (int i = threadIdx.x * kSize; i < p.width; i += kThreads * kSize) f(i);
  }

  // The factor that the norm multiplies all values by.
  DFLASH_INLINE float scale(float squares) const {
    return rsqrtf(block_merge<kThreads>(Sum{squares}).value / p.width + float(p.eps));
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
    const T* update = static_cast<const T*>(p.update) + which * p.update_stride;
    T* total = static_cast<T*>(p.total) + start;
    float update_scale = 1;
    if (p.update_norm) {
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
        load(u, update + i, aligned);
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

// A row of at most kLanes * kChunks chunks of 16 bytes, which the threads of a warp or of a block hold: chunk j of thread i
// is number i + kLanes * j.
template <class T, int kLanes, int kChunks>
struct HeldRow {
  static constexpr int kSize = Chunk<T>::kSize, kMostWidth = kLanes * kChunks * kSize;
  using Chunks = Chunk<T>[kChunks];
  using Values = float[kChunks][kSize];

  const AddRmsNormParams& p;
  const bool aligned;
  const int lane = threadIdx.x % kLanes;

  DFLASH_INLINE int at(int j) const { return (lane + kLanes * j) * kSize; }
  DFLASH_INLINE bool has(int j) const { return at(j) < p.width; }

  // Starts to load a row. What is beyond it is zeros.
  DFLASH_INLINE void start_load(Chunks& to, const void* row, int64_t start = 0) const {
    const T* const from = static_cast<const T*>(row) + start;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      to[j] = {};
      if (!has(j)) continue;
      if (aligned) {
        to[j] = *reinterpret_cast<const Chunk<T>*>(from + at(j));
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) to[j].values[k] = from[at(j) + k];
      }
    }
  }

  DFLASH_INLINE void write(void* row, int64_t start, const Values& x) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (has(j)) store(static_cast<T*>(row) + start + at(j), x[j], aligned);
    }
  }

  // Calls f(j, k) for every element.
  template <class F>
  DFLASH_INLINE static void for_each(F&& f) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) f(j, k);
    }
  }

  // The sum over the threads that hold the row.
  DFLASH_INLINE static float total_of(float x) {
    if constexpr (kLanes > 32) return block_merge<kLanes>(Sum{x}).value;
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(~0u, x, mask);
    return x;
  }

  DFLASH_INLINE void normalise(Values& x, const Chunks& weight) const {
    float squares = 0;
    for_each([&](int j, int k) { squares += x[j][k] * x[j][k]; });
    const float scale = rsqrtf(total_of(squares) / p.width + float(p.eps)), one = p.plus_one ? 1.f : 0.f;
    for_each([&](int j, int k) { x[j][k] *= scale * (to_float(weight[j].values[k]) + one); });
  }

  DFLASH_INLINE void run(int64_t row) const {
    const int64_t start = row * p.width;
    Chunks update, residual, norm;
    Values x;
    if (p.update != nullptr) start_load(update, p.update, row * p.update_stride);
    start_load(residual, p.residual, start);
    start_load(norm, p.norm);
    if (p.update == nullptr) {
      for_each([&](int j, int k) { x[j][k] = to_float(residual[j].values[k]); });
    } else {
      for_each([&](int j, int k) { x[j][k] = to_float(update[j].values[k]); });
      if (p.update_norm != nullptr) {
        start_load(update, p.update_norm);
        normalise(x, update);
      }
      // The sum is that of rounded numbers, as in the model's own modules.
      for_each([&](int j, int k) {
        const float added = to_float(from_float<T>(x[j][k]));
        x[j][k] = to_float(from_float<T>(to_float(residual[j].values[k]) + added));
      });
      write(p.total, start, x);
    }
    normalise(x, norm);
    write(p.out, start, x);
  }
};

template <class T>
DFLASH_INLINE bool all_aligned(const AddRmsNormParams& p) {
  return p.update_stride % Chunk<T>::kSize == 0 && is_aligned(p.residual) && is_aligned(p.total) && is_aligned(p.norm) && is_aligned(p.out) &&
         is_aligned(p.update) && is_aligned(p.update_norm);
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_rms_norm_sm80(const AddRmsNormParams params) {
  extern __shared__ __align__(16) float row[];
  overlap_with_neighbours();
  LongRow<T>{params, row, all_aligned<T>(params)}.run(blockIdx.x);
}

template <class T>
using ShortRow = HeldRow<T, 32, 4>;
template <class T>
using BlockRow = HeldRow<T, kThreads, 1>;

template <class T>
__global__ void __launch_bounds__(32 * kShortRows)
    add_rms_norm_short_sm80(const __grid_constant__ AddRmsNormParams params) {
  overlap_with_neighbours();
  const int64_t row = int64_t(blockIdx.x) * kShortRows + threadIdx.x / 32;
  if (row < params.rows) ShortRow<T>{params, all_aligned<T>(params)}.run(row);
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_rms_norm_block_sm80(const __grid_constant__ AddRmsNormParams params) {
  overlap_with_neighbours();
  BlockRow<T>{params, all_aligned<T>(params)}.run(blockIdx.x);
}

}  // namespace
}  // namespace device

const char* add_rms_norm_sm80(const AddRmsNormParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    LaunchShape shape{.blocks = params.rows, .threads = device::kThreads};
    if (params.width <= device::ShortRow<T>::kMostWidth) {
      shape.blocks = (params.rows + device::kShortRows - 1) / device::kShortRows;
      shape.threads = 32 * device::kShortRows;
      return launch_layer_kernel(device::add_rms_norm_short_sm80<T>, shape, stream, params);
    }
    if (params.width <= device::BlockRow<T>::kMostWidth) {
      return launch_layer_kernel(device::add_rms_norm_block_sm80<T>, shape, stream, params);
    }
    shape.shared_bytes = static_cast<int>(params.width * sizeof(float));
    return launch_layer_kernel(device::add_rms_norm_sm80<T>, shape, stream, params);
  });
}

}  // namespace dflash
