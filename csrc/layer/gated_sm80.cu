// activation(gate) * up. A thread computes 16 bytes of the result.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/activation.h"
#include "layer/launch.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) gated_sm80(const GatedParams p) {
  constexpr int kSize = Chunk<T>::kSize;
  overlap_with_neighbours();
  const int64_t chunks = p.width / kSize, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.rows * chunks) return;
  const int64_t row = i / chunks, column = i % chunks * kSize;
  const T* gate = static_cast<const T*>(p.gate) + row * p.stride + column;
  const T* up = static_cast<const T*>(p.up) + row * p.stride + column;
  float x[kSize], y[kSize];
  const bool aligned = is_aligned(gate) && is_aligned(up) && is_aligned(p.out);
  load(x, gate, aligned);
  load(y, up, aligned);
  // The activation is rounded before the product, as in the model's own modules.
#pragma unroll
  for (int k = 0; k < kSize; ++k) x[k] = to_float(from_float<T>(activated<float>(p.activation, x[k]))) * y[k];
  store(static_cast<T*>(p.out) + row * p.width + column, x, aligned);
}

}  // namespace
}  // namespace device

const char* gated_sm80(const GatedParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t chunks = params.rows * (params.width / device::Chunk<T>::kSize);
    LaunchShape shape{.blocks = (chunks + device::kThreads - 1) / device::kThreads, .threads = device::kThreads};
    return launch_layer_kernel(device::gated_sm80<T>, shape, stream, params);
  });
}

}  // namespace dflash
