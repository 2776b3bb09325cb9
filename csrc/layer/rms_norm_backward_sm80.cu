// The gradients of an RMS norm. A block goes through the rows of one part and sums the weight's gradient over them.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256;

// Sums over a row: x * x, and weight * grad * x.
struct RowSums {
  float squares = 0, products = 0;
  DFLASH_INLINE void merge(const RowSums& other) {
    squares += other.squares;
    products += other.products;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_sm80(const RmsNormBackwardParams p) {
  constexpr int kSize = Chunk<T>::kSize;
  extern __shared__ __align__(16) float sums[];  // [width]; every thread uses only its own columns
  overlap_with_neighbours();
  const T* weight = static_cast<const T*>(p.weight);
  const bool aligned = is_aligned(p.x) && is_aligned(p.weight) && is_aligned(p.grad) && is_aligned(p.grad_total) &&
                       is_aligned(p.grad_x);
  const int first = threadIdx.x * kSize;
  for (int i = first; i < p.width; i += kThreads * kSize) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sums[i + k] = 0;
  }
  for (int64_t row = blockIdx.x; row < p.rows; row += p.parts) {
    const int64_t start = row * p.width;
    const T *x_row = static_cast<const T*>(p.x) + start, *grad_row = static_cast<const T*>(p.grad) + start;
    RowSums row_sums;
    for (int i = first; i < p.width; i += kThreads * kSize) {
      float x[kSize], grad[kSize], w[kSize];
      load(x, x_row + i, aligned);
      load(grad, grad_row + i, aligned);
      load(w, weight + i, aligned);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        row_sums.squares += x[k] * x[k];
        row_sums.products += w[k] * grad[k] * x[k];
      }
    }
    row_sums = block_merge<kThreads>(row_sums);
    const float scale = rsqrtf(row_sums.squares / p.width + float(p.eps));
    const float slope = scale * scale * row_sums.products / p.width;
    // The second reads of the row come from a cache.
    for (int i = first; i < p.width; i += kThreads * kSize) {
      float x[kSize], grad[kSize], w[kSize], total[kSize] = {};
      load(x, x_row + i, aligned);
      load(grad, grad_row + i, aligned);
      load(w, weight + i, aligned);
      if (p.grad_total) load(total, static_cast<const T*>(p.grad_total) + start + i, aligned);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        total[k] += scale * (w[k] * grad[k] - x[k] * slope);
        sums[i + k] += grad[k] * x[k] * scale;
      }
      store(static_cast<T*>(p.grad_x) + start + i, total, aligned);
    }
  }
  float* parts = static_cast<float*>(p.grad_weight) + int64_t(blockIdx.x) * p.width;
  for (int i = first; i < p.width; i += kThreads * kSize) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) parts[i + k] = sums[i + k];
  }
}

}  // namespace
}  // namespace device

const char* rms_norm_backward_sm80(const RmsNormBackwardParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    LaunchShape shape{.blocks = params.parts, .threads = device::kThreads,
                      .shared_bytes = static_cast<int>(params.width * sizeof(float))};
    return launch_layer_kernel(device::rms_norm_backward_sm80<T>, shape, stream, params);
  });
}

}  // namespace dflash
