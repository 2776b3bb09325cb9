// The weights of a chunk of the vocabulary for `soft_embedding`, on any GPU since Ampere: one block a row.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/logits_gpu.h"
#include "sample/weights_gpu.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 512, kLoads = 4;

struct Largest {
  float value = -kInfinity;
  DFLASH_INLINE void add(float x) { value = fmaxf(value, x); }
  DFLASH_INLINE void merge(const Largest& other) { add(other.value); }
};
struct Sum {
  float value = 0;
  DFLASH_INLINE void merge(const Sum& other) { value += other.value; }
};

// softcap(x) * rate - origin of a logit. The soft cap is s * tanh(x / s) = s - 2 s / (2^(x * inner) + 1).
template <class T, bool kCaps>
struct Score {
  float cap, inner, top, twice;  // cap, top, twice: s * rate, s * rate - origin, 2 s * rate
  float rate, origin;

  DFLASH_INLINE Score(float softcap, float rate, float origin)
      : cap(softcap * rate), inner((kIsCoarse ? 1 : 2 * kLog2E) / softcap), top(softcap * rate - origin),
        twice(2 * softcap * rate), rate(rate), origin(origin) {}
  // NaN counts as -inf, and +inf as the largest number.
  DFLASH_INLINE float operator()(float x) const {
    if constexpr (kCaps && kIsCoarse) return cap * tanh_of(x * inner) - origin;
    if constexpr (kCaps) return top - __fdividef(twice, exp2_of(x * inner) + 1);
    return fminf(fmaxf(x, -kInfinity) * rate, 3e38f) - origin;
  }

 private:
  static constexpr bool kIsCoarse = std::is_same_v<T, __nv_bfloat16>;  // rounding such logits errs by more than tanh_of
};

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
  const auto largest_of = [&](int logits) {
    Largest own;
    for_each_chunk(logits, [&](int, const Chunk<T>& chunk) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) own.add(to_float(chunk.values[k]));
    });
    return block_merge<kThreads>(own).value;
  };

  float origin = p.begin == 0 ? -kInfinity : p.origins[row];
  float sum = p.begin == 0 ? 0 : p.sums[row];
  // Raises the origin to the score of the largest logit, if weights could overflow otherwise.
  const auto raised_to = [&](float largest) {
    const float top = softcap > 0 ? Score<T, true>(softcap, rate, 0)(largest) : Score<T, false>(softcap, rate, 0)(largest);
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
    raised_to(largest_of(kHeadroom<Weight> == 0 ? count : min(count, kStride)));
  }

  // Writes the weights, and returns the sum of what was written.
  const auto weigh = [&](auto score) {
    Sum own;
    for_each_chunk(count, [&](int i, const Chunk<T>& chunk) {
      float w[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) w[k] = exp2_of(fmaxf(score(to_float(chunk.values[k])), -1e4f));  // 0 if it is NaN
      if (stores_aligned && i + kSize <= count) {
        own.value += store_rounded(weights + i, w);
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (i + k >= count) continue;
          weights[i + k] = from_float<Weight>(w[k]);
          own.value += to_float(from_float<Weight>(w[k]));
        }
      }
    });
    return block_merge<kThreads>(own).value;
  };
  float added;
  do {
    added = softcap > 0 ? weigh(Score<T, true>(softcap, rate, origin)) : weigh(Score<T, false>(softcap, rate, origin));
  } while (kHeadroom<Weight> > 0 && !(added < exp2_of(kHeadroom<Weight>)) && raised_to(largest_of(count)));
  if (threadIdx.x == 0) {
    p.origins[row] = origin;
    p.sums[row] = sum + added;
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
