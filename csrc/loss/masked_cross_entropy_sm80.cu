// Masked cross-entropy on any GPU since Ampere, with one block a row. Every thread keeps running sums of its share. The
// forward reads a row once. The backward reads it once and writes it once. The in-place pass does both, and its second
// read hits the cache.
#include "common/dispatch.h"
#include "loss/kernels.h"
#include "loss/row_part.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256;
// Blocks per multiprocessor, which bound the registers. The teacher's sums take twice as many registers.
template <bool kTeacher>
constexpr int kMinBlocks = kTeacher ? 2 : 4;

struct Variation {
  float distance = 0, mean_sign = 0;
  DFLASH_INLINE void merge(const Variation& other) {
    distance += other.distance;
    mean_sign += other.mean_sign;
  }
};

template <class T, bool kTeacher>
struct CrossEntropyRow {
  using Stats = RowStats<float>;
  const RowHead& head;
  const RowLoss<float> loss;
  const int vocab, target;
  const T* x;
  const T* y;

  DFLASH_INLINE explicit CrossEntropyRow(const RowHead& head)
      : head(head), loss(head.params), vocab(head.params.vocab), target(head.target),
        x(static_cast<const T*>(head.params.logits) + head.start(head.params.logits_strides)),
        y(kTeacher ? static_cast<const T*>(head.params.teacher) + head.start(head.params.teacher_strides) : nullptr) {}

  // Calls f(index, logits, teacher's logits) over this thread's share: chunks of 16 bytes that are aligned in x, and
  // the single elements before and after them.
  template <class F>
  DFLASH_INLINE void for_each(F&& f) const {
    constexpr int kSize = Chunk<T>::kSize;
    const int misaligned = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
    const int head = misaligned ? min(kSize - misaligned, vocab) : 0;
    const int chunks = (vocab - head) / kSize;
    const bool teacher_aligned = kTeacher && is_aligned(y + head);
    for (int c = threadIdx.x; c < chunks; c += kThreads) {
      const int i = head + c * kSize;
      float logits[kSize], teacher[kSize] = {};
      load(logits, x + i, true);
      if constexpr (kTeacher) load(teacher, y + i, teacher_aligned);
      f(i, logits, teacher);
    }
    const int singles = vocab - chunks * kSize;
    for (int s = threadIdx.x; s < singles; s += kThreads) {
      const int i = s < head ? s : s + chunks * kSize;
      float logits[1], teacher[1] = {};
      load(logits, x + i, false);
      if constexpr (kTeacher) load(teacher, y + i, false);
      f(i, logits, teacher);
    }
  }

  // This is a second read of the row, because p and t need their normalisers first.
  DFLASH_INLINE Variation variation(const Stats& stats) const {
    Variation sum;
    for_each([&](int, auto& logits, auto& teacher) {
#pragma unroll
      for (int k = 0; k < int(sizeof(logits) / 4); ++k) {
        const float p = stats.probability(loss.softcap(logits[k])), t = stats.teacher_probability(teacher[k]);
        const float sign = half_sign(p, t);
        sum.merge({sign * (p - t), sign * p});
      }
    });
    return block_merge<kThreads>(sum);
  }

  DFLASH_INLINE Stats forward() const {
    RowPart part;
    for_each([&](int i, auto& logits, auto& teacher) { part.add<T, kTeacher>(loss, target, i, logits, teacher); });
    part = block_merge<kThreads>(part);
    Stats stats = loss.stats(part);
    Variation tv;
    if (kTeacher && loss.teacher == Teacher::kTV) tv = variation(stats);
    stats.mean_sign = tv.mean_sign;
    if (threadIdx.x == 0) {
      const float logit = target < 0 ? kNaN : to_float(x[target]);
      head.write(loss.values(part, loss.softcap(logit), tv.distance), part.is_argmax(target, logit));
    }
    __syncthreads();  // the in-place pass overwrites x[target] next
    return stats;
  }

  // `grad` may be `x`, because the same thread reads and writes an element.
  DFLASH_INLINE void backward(T* grad, const Stats& stats, float scale) const {
    const RowGradient<float> gradient(loss, stats, target < 0 ? kNaN : scale);
    for_each([&](int i, auto& logits, auto& teacher) {
      float g[sizeof(logits) / 4];
      gradients<kTeacher>(g, gradient, loss.softcap, target, i, logits, teacher);
      store(grad + i, g, is_aligned(grad + i));
    });
  }
};

template <class T, bool kTeacher, Pass kPass>
__global__ void __launch_bounds__(kThreads, kMinBlocks<kTeacher>)
    masked_cross_entropy_sm80(const CrossEntropyParams params) {
  const RowHead head(params, blockIdx.x);
  const CrossEntropyRow<T, kTeacher> row(head);
  using Stats = RowStats<float>;
  Stats* stats = static_cast<Stats*>(params.stats) + head.row;
  T* grad = static_cast<T*>(params.grad) + head.start(params.grad_strides);

  if (head.weight == 0) {
    if (kPass != Pass::kBackward && threadIdx.x == 0) head.write({}, false);
    if (kPass == Pass::kForward && threadIdx.x == 0) *stats = Stats{};
    if (kPass != Pass::kForward) {
      for (int i = threadIdx.x; i < row.vocab; i += kThreads) grad[i] = from_float<T>(0.f);
    }
  } else if constexpr (kPass == Pass::kForward) {
    const Stats own = row.forward();
    if (threadIdx.x == 0) *stats = own;
  } else if constexpr (kPass == Pass::kBackward) {
    row.backward(grad, *stats, head.weight * static_cast<const float*>(params.grad_losses)[head.row]);
  } else {
    row.backward(grad, row.forward(), head.weight);
  }
}

template <class T, bool kTeacher>
cudaError_t launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  const auto kernel = p.pass == Pass::kForward    ? masked_cross_entropy_sm80<T, kTeacher, Pass::kForward>
                      : p.pass == Pass::kBackward ? masked_cross_entropy_sm80<T, kTeacher, Pass::kBackward>
                                                  : masked_cross_entropy_sm80<T, kTeacher, Pass::kInPlace>;
  return launch_kernel(kernel, {p.rows, kThreads}, stream, p);
}

template <class T>
cudaError_t launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  const bool has_teacher = p.teacher_kind != Teacher::kNone && p.teacher_mix != 0;
  return has_teacher ? launch_rows<T, true>(p, stream) : launch_rows<T, false>(p, stream);
}

}  // namespace
}  // namespace device

const char* masked_cross_entropy_sm80(const CrossEntropyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_rows<T>(p, stream);
  });
}

}  // namespace dflash
