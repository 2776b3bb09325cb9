// Which masked positions of a canvas to commit, on any GPU since Ampere: one block a row, in one launch. The block sorts
// the positions by score, and finds the first that the rule does not take.
#include <cuda_runtime.h>

#include "common/launch.h"
#include "sample/filters.h"
#include "sample/kernels.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

DFLASH_INLINE int lane_id() { return threadIdx.x % 32; }
DFLASH_INLINE int warp_id() { return threadIdx.x / 32; }

// The entropies of the positions so far.
struct Entropies {
  double sum = 0, largest = 0;

  DFLASH_INLINE void add(double entropy) {
    sum += entropy;
    largest = entropy > largest ? entropy : largest;
  }
  DFLASH_INLINE void merge(const Entropies& before) {
    sum += before.sum;
    largest = before.largest > largest ? before.largest : largest;
  }
};

template <class Real>
class CanvasRow {
 public:
  DFLASH_INLINE CanvasRow(const RevealParams& p, int64_t row, int* order)
      : p_(p), scores_(of_row(p.scores, row)), entropy_(of_row(p.entropy, row)), masked_(p.masked + row * p.length),
        revealed_(p.revealed + row * p.length), limit_(value_of<Real>(p.limit, row)), length_(p.length), order_(order) {}

  DFLASH_INLINE void reveal(int capacity) {
    sort(capacity);
    const int taken = count_taken();
    for (int nth = threadIdx.x; nth < length_; nth += kThreads) revealed_[order_[nth]] = nth < taken;
  }

 private:
  DFLASH_INLINE const Real* of_row(const void* tensor, int64_t row) const {
    return tensor ? static_cast<const Real*>(tensor) + row * p_.length : nullptr;
  }

  // The order of positions: masked ones before others, then the higher score, then the left one. NaN counts as -inf.
  DFLASH_INLINE bool precedes(int a, int b) const {
    if (a >= length_ || b >= length_) return a < b;
    if (masked_[a] != masked_[b]) return masked_[a];
    const Real x = score(a), y = score(b);
    return x == y ? a < b : x > y;
  }

  DFLASH_INLINE Real score(int position) const {
    if (scores_ == nullptr) return 0;
    const Real score = scores_[position];
    return score > -kInfinity ? score : -kInfinity;
  }

  // Sorts all positions (bitonic). `capacity` is a power of 2 of at least the length.
  DFLASH_INLINE void sort(int capacity) {
    for (int i = threadIdx.x; i < capacity; i += kThreads) order_[i] = i;
    for (int run = 2; run <= capacity; run *= 2) {
      for (int stride = run / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < capacity / 2; i += kThreads) {
          const int place = 2 * i - (i & (stride - 1));
          const int a = order_[place], b = order_[place + stride];
          const bool rises = (place & run) == 0;
          if (precedes(b, a) == rises) {
            order_[place] = b;
            order_[place + stride] = a;
          }
        }
      }
    }
    __syncthreads();
  }

  // Returns how many positions of the order the rule takes.
  DFLASH_INLINE int count_taken() {
    const int share = (length_ + kThreads - 1) / kThreads;
    const int begin = min(length_, int(threadIdx.x) * share), end = min(length_, begin + share);
    Entropies before;
    if (p_.rule == Reveal::kEntropyBound) before = entropies_before(begin, end);
    int taken = length_;
    for (int i = begin; i < end && taken == length_; ++i) {
      const int position = order_[i];
      if (!masked_[position] || !takes(i + 1, position, before)) taken = i;
    }
    return block_min(taken);
  }

  DFLASH_INLINE bool takes(int nth, int position, Entropies& entropies) const {
    const bool is_first = nth == 1;  // it is always taken, so that every step makes progress
    switch (p_.rule) {
      case Reveal::kCount: return nth <= limit_;
      case Reveal::kThreshold: return is_first || scores_[position] > limit_;
      case Reveal::kAtLeast: return is_first || scores_[position] >= limit_;
      case Reveal::kFactor: return is_first || scores_[position] >= 1 - limit_ / (nth + 1);
      case Reveal::kEntropyBound:
        entropies.add(entropy_[position]);
        return is_first || entropies.sum - entropies.largest <= limit_;
    }
    return false;
  }

  // Returns the sum and the largest of the entropies before place `begin` of the order.
  DFLASH_INLINE Entropies entropies_before(int begin, int end) {
    __shared__ double storage[kWarps][2];
    Entropies own;
    for (int i = begin; i < end; ++i) {
      if (masked_[order_[i]]) own.add(entropy_[order_[i]]);
    }
    Entropies warp = own;  // of this lane and those before it
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const Entropies other = shuffle_up(warp, step);
      if (lane_id() >= step) warp.merge(other);
    }
    if (lane_id() == 31) {
      storage[warp_id()][0] = warp.sum;
      storage[warp_id()][1] = warp.largest;
    }
    __syncthreads();
    Entropies before = shuffle_up(warp, 1);
    if (lane_id() == 0) before = {};
    for (int w = 0; w < warp_id(); ++w) before.merge({storage[w][0], storage[w][1]});
    return before;
  }

  DFLASH_INLINE static Entropies shuffle_up(const Entropies& e, int step) {
    return {__shfl_up_sync(~0u, e.sum, step), __shfl_up_sync(~0u, e.largest, step)};
  }

  DFLASH_INLINE static int block_min(int x) {
    __shared__ int smallest;
    if (threadIdx.x == 0) smallest = x;
    __syncthreads();
    x = __reduce_min_sync(~0u, x);
    if (lane_id() == 0) atomicMin(&smallest, x);
    __syncthreads();
    return smallest;
  }

  const RevealParams& p_;
  const Real* const scores_;
  const Real* const entropy_;
  const bool* const masked_;
  bool* const revealed_;
  const Real limit_;
  const int length_;
  int* const order_;
};

template <class Real>
__global__ void __launch_bounds__(kThreads, 1) reveal_rows_sm80(const RevealParams params, const int capacity) {
  extern __shared__ int shared_order[];
  int* const order = params.order ? params.order + int64_t(blockIdx.x) * capacity : shared_order;
  CanvasRow<Real>(params, blockIdx.x, order).reveal(capacity);
}

}  // namespace
}  // namespace device

const char* reveal_sm80(const RevealParams& p, void* stream) {
  return checked_launch([&] {
    const int64_t capacity = reveal_capacity(p.length);
    const auto kernel = p.is_double ? device::reveal_rows_sm80<double> : device::reveal_rows_sm80<float>;
    const int shared_bytes = p.order ? 0 : static_cast<int>(capacity * sizeof(int));
    return launch_kernel(kernel, {p.rows, device::kThreads, shared_bytes}, static_cast<cudaStream_t>(stream), p,
                         static_cast<int>(capacity));
  });
}

}  // namespace dflash
