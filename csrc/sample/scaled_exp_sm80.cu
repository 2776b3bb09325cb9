// The weights of a chunk of the vocabulary for `soft_embedding`, on any GPU since Ampere: one block a row.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/logits_gpu.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 512, kLoads = 4;

// The largest logit, and the sum of weights.
struct Measured {
  float largest = -kInfinity, sum = 0;
  DFLASH_INLINE void merge(const Measured& other) {
    largest = fmaxf(largest, other.largest);
    sum += other.sum;
  }
};

// Returns softcap(x) * rate. NaN counts as -inf, and +inf as the largest number.
DFLASH_INLINE float score(float x, float softcap, float rate) {
  if (softcap > 0) x = softcap - __fdividef(2 * softcap, exp2_of(x * (2 * kLog2E / softcap)) + 1);
  return fminf(fmaxf(x, -kInfinity) * rate, 3e38f);
}

// How far, in units of log2, weights may exceed 1 before the origin is raised. It lets the first logits of a row choose
// the origin, so that the row is read once.
template <class Weight>
constexpr float kHeadroom = 64;
template <>
inline constexpr float kHeadroom<__half> = 0;  // whose range is small: all logits of the chunk choose it

template <class T, class Weight>
__global__ void __launch_bounds__(kThreads, 2) scaled_exp_sm80(const ScaledExpParams p) {
  constexpr int kSize = Chunk<T>::kSize, kStride = kThreads * kSize;
  const int64_t row = blockIdx.x;
  const T* const x = static_cast<const T*>(p.logits) + row * p.stride + p.begin;
  Weight* const weights = static_cast<Weight*>(p.weights) + row * p.count;
  const int count = p.count;
  const bool aligned = is_aligned(x), stores_aligned = is_aligned(weights);
  const float softcap = p.softcap;
  // As in `sample`, temperatures that float32 cannot divide by count as the nearest that it can.
  const float rate = kLog2E / fminf(fmaxf(value_of<float>(p.temperature, row), 1e-30f), 1e30f);

  // Calls f(i, chunk) for this thread's chunks of the first logits.
  const auto for_each_chunk = [&](int logits, auto&& f) {
    int begin = threadIdx.x * kSize;
    for (; aligned && begin + (kLoads - 1) * kStride + kSize <= logits; begin += kLoads * kStride) {
      Chunk<T> chunks[kLoads];
#pragma unroll
      for (int c = 0; c < kLoads; ++c) chunks[c] = *reinterpret_cast<const Chunk<T>*>(x + begin + c * kStride);
#pragma unroll
      for (int c = 0; c < kLoads; ++c) f(begin + c * kStride, chunks[c]);
    }
    for (; begin < logits; begin += kStride) f(begin, load_chunk(x, uint32_t(count), begin, aligned));
  };
  // Scores rise with the logit, so that the largest logit has the largest score.
  const auto add_largest = [](Measured& own, const Chunk<T>& chunk) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) own.largest = fmaxf(own.largest, to_float(chunk.values[k]));
  };

  float origin = p.begin == 0 ? -kInfinity : p.origins[row];
  float sum = p.begin == 0 ? 0 : p.sums[row];
  // Raises the origin to the score of the largest logit, if weights could overflow otherwise.
  const auto raised_to = [&](float largest) {
    const float top = score(largest, softcap, rate);
    if (!(top > origin + kHeadroom<Weight>)) return false;
    const float scale = origin == -kInfinity ? 0.f : exp2_of(origin - top);
    if (p.begin > 0) {
      for (int i = threadIdx.x; i < p.width; i += kThreads) p.embedded[row * p.width + i] *= scale;
    }
    sum *= scale;
    origin = top;
    return true;
  };
  if (origin == -kInfinity || kHeadroom<Weight> == 0) {
    Measured first;
    for_each_chunk(kHeadroom<Weight> == 0 ? count : min(count, kStride),
                   [&](int, const Chunk<T>& chunk) { add_largest(first, chunk); });
    raised_to(block_merge<kThreads>(first).largest);
  }

  Measured own;
  do {
    own = {};
    for_each_chunk(count, [&](int i, const Chunk<T>& chunk) {
      add_largest(own, chunk);
      float w[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        w[k] = exp2_of(fmaxf(score(to_float(chunk.values[k]), softcap, rate) - origin, -1e4f));  // 0 if it is NaN
        if (i + k < count) own.sum += to_float(from_float<Weight>(w[k]));
      }
      if (i + kSize <= count && kSize == Chunk<Weight>::kSize) {
        store(weights + i, w, stores_aligned);
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (i + k < count) weights[i + k] = from_float<Weight>(w[k]);
        }
      }
    });
    own = block_merge<kThreads>(own);
  } while (raised_to(own.largest));
  if (threadIdx.x == 0) {
    p.origins[row] = origin;
    p.sums[row] = sum + own.sum;
  }
}

}  // namespace
}  // namespace device

const char* scaled_exp_sm80(const ScaledExpParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const auto kernel = p.weight_dtype == DType::kBFloat16  ? device::scaled_exp_sm80<T, __nv_bfloat16>
                        : p.weight_dtype == DType::kFloat16 ? device::scaled_exp_sm80<T, __half>
                                                            : device::scaled_exp_sm80<T, float>;
    return launch_kernel(kernel, {p.rows, device::kThreads}, stream, p);
  });
}

}  // namespace dflash
