// Logits under a soft cap, in one read and one write, on any GPU since Ampere.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/logits_gpu.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256, kLoads = 4;

// softcap * tanh(x / softcap); the cap itself for an infinite x, and NaN for NaN.
DFLASH_INLINE float capped(float x, float softcap) {
  const float e = exp2_of(x * (2 * kLog2E / softcap));
  return e < 1e30f ? softcap - __fdividef(2 * softcap, e + 1) : e >= 1e30f ? softcap : x;
}

// Each thread writes where it has read: numbers of the same size, of type Out.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads) softcap_sm80(const SoftcapParams p) {
  static_assert(sizeof(T) == sizeof(Out));
  constexpr int kSize = Chunk<T>::kSize, kStride = kThreads * kSize;
  const int64_t begin = int64_t(blockIdx.x) * kLoads * kStride;
  const T* const x = static_cast<const T*>(p.logits) + begin;
  Out* const out = static_cast<Out*>(p.logits) + begin;
  const int64_t left = p.count - begin;
  const uint32_t count = left < kLoads * kStride ? left : kLoads * kStride;
  const bool aligned = is_aligned(x);
  Chunk<T> chunks[kLoads];
#pragma unroll
  for (int c = 0; c < kLoads; ++c) chunks[c] = load_chunk(x, count, c * kStride + threadIdx.x * kSize, aligned);
#pragma unroll
  for (int c = 0; c < kLoads; ++c) {
    const uint32_t i = c * kStride + threadIdx.x * kSize;
    float own[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) own[k] = capped(to_float(chunks[c].values[k]), p.softcap);
    if (i + kSize <= count) {
      store(out + i, own, aligned);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (i + k < count) out[i + k] = from_float<Out>(own[k]);
      }
    }
  }
}

}  // namespace
}  // namespace device

const char* softcap_sm80(const SoftcapParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const auto kernel = device::softcap_sm80<T, std::conditional_t<sizeof(T) == 2, __half, float>>;
    constexpr int64_t kTile = device::kThreads * device::kLoads * device::Chunk<T>::kSize;
    return launch_kernel(kernel, {(p.count + kTile - 1) / kTile, device::kThreads}, stream, p);
  });
}

}  // namespace dflash
