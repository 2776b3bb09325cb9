// Masked cross-entropy on CUDA: one block a row. Every thread keeps running sums of its share; the forward reads a row
// once, the backward reads it once and writes it once, and the in-place pass does both while the row is in the cache.
#include "loss/kernels.h"
#include "loss/row.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256;
// Blocks per multiprocessor: bounds the registers. The teacher's sums take twice as many.
template <bool kTeacher>
constexpr int kMinBlocks = kTeacher ? 2 : 4;

// A thread's or a block's part of a row.
struct RowPart : RowSums<float> {
  float before = -kInfinity, rest = -kInfinity;  // largest logit before the target, and from it on

  DFLASH_INLINE void merge(const RowPart& other) {
    RowSums<float>::merge(other);
    before = fmaxf(before, other.before);
    rest = fmaxf(rest, other.rest);
  }
};

struct Variation {
  float distance = 0, mean_sign = 0;
  DFLASH_INLINE void merge(const Variation& other) {
    distance += other.distance;
    mean_sign += other.mean_sign;
  }
};

template <class T, bool kTeacher>
struct CrossEntropyRow {
  const CrossEntropyParams& params;
  const RowLoss<float> loss;
  const int64_t row;
  const int vocab, target;  // target: -1 if it is outside the vocabulary
  const T* x;
  const T* y;

  DFLASH_INLINE explicit CrossEntropyRow(const CrossEntropyParams& p)
      : params(p), loss(p), row(blockIdx.x), vocab(p.vocab),
        target(p.target[row] >= 0 && p.target[row] < p.vocab ? int(p.target[row]) : -1),
        x(static_cast<const T*>(p.logits) + start(p.logits_strides)),
        y(kTeacher ? static_cast<const T*>(p.teacher) + start(p.teacher_strides) : nullptr) {}

  DFLASH_INLINE int64_t start(const RowStrides& s) const {
    return row / params.inner * s.outer + row % params.inner * s.inner;
  }
  DFLASH_INLINE float weight() const { return params.weight ? static_cast<const float*>(params.weight)[row] : 1.f; }

  // Calls f(index, logits, teacher's logits) over this thread's share: chunks of 16 bytes, aligned for x, and the
  // single elements before and after them.
  template <class F>
  DFLASH_INLINE void for_each(F&& f) const {
    constexpr int kSize = Chunk<T>::kSize;
    const int misaligned = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
    const int head = misaligned ? min(kSize - misaligned, vocab) : 0;
    const int chunks = (vocab - head) / kSize;
    const bool teacher_aligned = kTeacher && is_aligned(y + head);
    for (int c = threadIdx.x; c < chunks; c += kThreads) {
      const int i = head + c * kSize;
      float z[kSize], t[kSize] = {};
      load(z, x + i, true);
      if constexpr (kTeacher) load(t, y + i, teacher_aligned);
      f(i, z, t);
    }
    const int singles = vocab - chunks * kSize;
    for (int s = threadIdx.x; s < singles; s += kThreads) {
      const int i = s < head ? s : s + chunks * kSize;
      float z[1], t[1] = {};
      load(z, x + i, false);
      if constexpr (kTeacher) load(t, y + i, false);
      f(i, z, t);
    }
  }

  template <int kCount>
  DFLASH_INLINE void add(RowPart& part, int index, float (&z)[kCount], const float (&y)[kCount]) const {
    float max = z[0], teacher_max = y[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) {
      max = fmaxf(max, z[k]);
      teacher_max = fmaxf(teacher_max, y[k]);
    }
    if (index + kCount <= target) {
      part.before = fmaxf(part.before, max);
    } else if (index >= target) {
      part.rest = fmaxf(part.rest, max);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) (index + k < target ? part.before : part.rest) = fmaxf(
          index + k < target ? part.before : part.rest, z[k]);
    }
    max = loss.softcap(max);
    if (max > part.max || (kTeacher && teacher_max > part.teacher_max)) part.raise(max, kTeacher ? teacher_max : -kInfinity);
    const float origin = finite_or_zero(part.max), teacher_origin = finite_or_zero(part.teacher_max);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      part.template add<kTeacher>(loss.softcap(z[k]), y[k], origin, teacher_origin);
    }
    part.count += kCount;
  }

  using Stats = RowLoss<float>::Stats;

  DFLASH_INLINE Stats forward() const {
    RowPart part;
    for_each([&](int i, auto& z, auto& t) { add(part, i, z, t); });
    part = block_merge<kThreads>(part);
    Stats stats = loss.stats(part);
    Variation variation;
    if (kTeacher && loss.teacher == Teacher::kTV) {
      for_each([&](int, auto& z, auto& t) {
#pragma unroll
        for (int k = 0; k < int(sizeof(z) / 4); ++k) {
          const float p = stats.probability(loss.softcap(z[k])), q = stats.teacher_probability(t[k]);
          const float sign = loss.half_sign(p, q);
          variation.merge({sign * (p - q), sign * p});
        }
      });
      variation = block_merge<kThreads>(variation);
      stats.mean_sign = variation.mean_sign;
    }
    if (threadIdx.x == 0) {
      const float logit = target >= 0 ? to_float(x[target]) : __int_as_float(0x7fffffff);
      const float nll = loss.nll(stats, loss.softcap(logit));
      write(loss.loss(part, stats, nll, variation.distance), nll, loss.entropy(part, stats),
            (target == 0 || logit > part.before) && logit >= part.rest);
    }
    return stats;
  }

  DFLASH_INLINE void write(float value, float nll, float entropy, bool correct) const {
    static_cast<float*>(params.losses)[row] = weight() * value;
    static_cast<float*>(params.nll)[row] = nll;
    static_cast<float*>(params.entropy)[row] = entropy;
    params.correct[row] = correct;
  }

  // `grad` may be `x`: every element is read and written by the same thread.
  DFLASH_INLINE void backward(T* grad, const Stats& stats, float scale) const {
    if (target < 0) scale = __int_as_float(0x7fffffff);
    for_each([&](int i, auto& z, auto& t) {
      constexpr int kCount = sizeof(z) / 4;
      float g[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float capped = loss.softcap(z[k]);
        g[k] = loss.template gradient<kTeacher>(stats, capped, t[k]);
        if (i + k == target) g[k] += loss.target_gradient(capped);
        g[k] *= scale;
      }
      store(grad + i, g, is_aligned(grad + i));
    });
  }

  DFLASH_INLINE void clear(T* grad) const {
    for (int i = threadIdx.x; i < vocab; i += kThreads) grad[i] = from_float<T>(0.f);
  }
};

template <class T, bool kTeacher, Pass kPass>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kTeacher>) masked_cross_entropy(const CrossEntropyParams params) {
  const CrossEntropyRow<T, kTeacher> kernel(params);
  using Stats = RowLoss<float>::Stats;
  T* grad = static_cast<T*>(params.grad) + kernel.start(params.grad_strides);
  Stats* stats = static_cast<Stats*>(params.stats) + kernel.row;
  const float weight = kernel.weight();

  if (weight == 0) {
    if (kPass != Pass::kBackward && threadIdx.x == 0) kernel.write(0, 0, 0, false);
    if (kPass == Pass::kForward && threadIdx.x == 0) *stats = Stats{};
    if (kPass != Pass::kForward) kernel.clear(grad);
  } else if constexpr (kPass == Pass::kForward) {
    const Stats own = kernel.forward();
    if (threadIdx.x == 0) *stats = own;
  } else if constexpr (kPass == Pass::kBackward) {
    const float upstream = static_cast<const float*>(params.grad_losses)[kernel.row];
    kernel.backward(grad, *stats, upstream * weight);
  } else {
    kernel.backward(grad, kernel.forward(), weight);
  }
}

template <class T, bool kTeacher>
void launch(const CrossEntropyParams& p, cudaStream_t stream) {
  const auto kernel = p.pass == Pass::kForward    ? masked_cross_entropy<T, kTeacher, Pass::kForward>
                      : p.pass == Pass::kBackward ? masked_cross_entropy<T, kTeacher, Pass::kBackward>
                                                  : masked_cross_entropy<T, kTeacher, Pass::kInPlace>;
  kernel<<<p.rows, kThreads, 0, stream>>>(p);
}

template <class T>
void launch(const CrossEntropyParams& p, cudaStream_t stream) {
  const bool has_teacher = p.teacher_kind != Teacher::kNone && p.teacher_mix != 0;
  has_teacher ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace
}  // namespace device

const char* masked_cross_entropy_sm80(const CrossEntropyParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFloat32: device::launch<float>(params, cuda_stream); break;
    case DType::kBFloat16: device::launch<__nv_bfloat16>(params, cuda_stream); break;
    case DType::kFloat16: device::launch<__half>(params, cuda_stream); break;
    case DType::kFloat64: return "float64 is not supported";
  }
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dflash
