// The gradients of activation(gate) * up, in place. A thread computes 16 bytes of each.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/activation.h"
#include "layer/launch.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256;

template <class T, int kCount>
DFLASH_INLINE void differentiate(const GatedBackwardParams& p, int64_t i, bool aligned) {
  float gate[kCount], up[kCount], grad[kCount];
  load(gate, static_cast<const T*>(p.gate) + i, aligned);
  load(up, static_cast<const T*>(p.up) + i, aligned);
  load(grad, static_cast<T*>(p.grad) + i, aligned);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    float value, slope;
    activated_with_slope<float>(p.activation, gate[k], value, slope);
    gate[k] = grad[k] * up[k] * slope;
    up[k] = grad[k] * value;
  }
  store(static_cast<T*>(p.grad) + i, gate, aligned);
  store(static_cast<T*>(p.other) + i, up, aligned);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gated_backward_sm80(const GatedBackwardParams p) {
  constexpr int kSize = Chunk<T>::kSize;
  overlap_with_neighbours();
  const bool aligned = is_aligned(p.gate) && is_aligned(p.up) && is_aligned(p.grad) && is_aligned(p.other);
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (first + kSize <= p.count) {
    differentiate<T, kSize>(p, first, aligned);
  } else {
    for (int64_t i = first; i < p.count; ++i) differentiate<T, 1>(p, i, false);
  }
}

}  // namespace
}  // namespace device

const char* gated_backward_sm80(const GatedBackwardParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    constexpr int64_t kEach = int64_t(device::kThreads) * device::Chunk<T>::kSize;
    LaunchShape shape{.blocks = (params.count + kEach - 1) / kEach, .threads = device::kThreads};
    return launch_layer_kernel(device::gated_backward_sm80<T>, shape, stream, params);
  });
}

}  // namespace dflash
