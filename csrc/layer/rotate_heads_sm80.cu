// The norm and the rotary embedding of heads, and their gradients. A warp holds one head in registers: a lane has the
// pairs (i, i + head_dim / 2) of every 32nd i.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarps = 8;

// kPairs pairs a lane, of numbers from [head_dim] or of cosines and sines from tables of [head_dim / 2].
template <int kPairs>
struct Head {
  float first[kPairs], second[kPairs];

  // Calls f(k, i) for the lane's pairs: the k-th one is that of dimension i.
  template <class F>
  static DFLASH_INLINE void for_each_pair(int half, F&& f) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const int i = threadIdx.x % 32 + 32 * k;
      if (i < half) f(k, i);
    }
  }

  template <class T>
  DFLASH_INLINE void read(const T* low, const T* high, int half) {
    for_each_pair(half, [&](int k, int i) {
      first[k] = to_float(low[i]);
      second[k] = to_float(high[i]);
    });
  }

  template <class T>
  DFLASH_INLINE void write(T* to, int half) const {
    for_each_pair(half, [&](int k, int i) {
      to[i] = from_float<T>(first[k]);
      to[i + half] = from_float<T>(second[k]);
    });
  }

  // Turns the pairs by the angles, or with kBack = -1 by their negatives.
  template <int kBack = 1>
  DFLASH_INLINE void rotate(const Head& tables) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const float cos = tables.first[k], sin = kBack * tables.second[k], a = first[k], b = second[k];
      first[k] = a * cos - b * sin;
      second[k] = b * cos + a * sin;
    }
  }

  DFLASH_INLINE float dot(const Head& other) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) sum += first[k] * other.first[k] + second[k] * other.second[k];
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
    return sum;
  }

  // this = a * this + b * other.
  DFLASH_INLINE void combine(float a, float b, const Head& other) {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      first[k] = a * first[k] + b * other.first[k];
      second[k] = a * second[k] + b * other.second[k];
    }
  }

  DFLASH_INLINE Head times(const Head& other) const {
    Head product;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      product.first[k] = first[k] * other.first[k];
      product.second[k] = second[k] * other.second[k];
    }
    return product;
  }
};

template <class T, int kPairs>
struct HeadReader {
  const RotateHeadsParams& p;
  const int half = int(p.head_dim / 2);

  DFLASH_INLINE Head<kPairs> head(const void* heads, int64_t which) const {
    Head<kPairs> x{};
    const T* from = static_cast<const T*>(heads) + which * p.head_dim;
    x.read(from, from + half, half);
    return x;
  }

  DFLASH_INLINE Head<kPairs> weight() const {
    Head<kPairs> w{};
    w.read(static_cast<const float*>(p.weight), static_cast<const float*>(p.weight) + half, half);
    return w;
  }

  // The cosines, first, and sines, second, of the row that a head stands in.
  DFLASH_INLINE Head<kPairs> tables(int64_t which) const {
    Head<kPairs> angles{};
    const int64_t start = which / p.heads * p.table_stride;
    angles.read(static_cast<const float*>(p.cos) + start, static_cast<const float*>(p.sin) + start, half);
    return angles;
  }

  DFLASH_INLINE float scale(const Head<kPairs>& x) const {
    return rsqrtf(x.dot(x) / p.head_dim + float(p.eps));
  }
};

template <class T, int kPairs>
__global__ void __launch_bounds__(32 * kWarps) rotate_heads_sm80(const RotateHeadsParams p) {
  overlap_with_neighbours();
  const HeadReader<T, kPairs> reader{p};
  const int64_t which = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (which >= p.rows * p.heads) return;
  const Head<kPairs> x = reader.head(p.x, which);
  Head<kPairs> normed = x.times(reader.weight());
  normed.combine(reader.scale(x), 0.f, x);
  normed.rotate(reader.tables(which));
  normed.write(static_cast<T*>(p.out) + which * p.head_dim, reader.half);
}

template <class T, int kPairs>
__global__ void __launch_bounds__(32 * kWarps) rotate_heads_backward_sm80(const RotateHeadsBackwardParams b) {
  __shared__ float sums[kWarps][64 * kPairs];
  overlap_with_neighbours();
  const RotateHeadsParams& p = b.forward;
  const HeadReader<T, kPairs> reader{p};
  const Head<kPairs> weight = reader.weight();
  const int warp = threadIdx.x / 32;
  Head<kPairs> grad_weight{};
  // A part has kWarps warps, which take turns.
  for (int64_t which = int64_t(blockIdx.x) + b.parts * warp; which < p.rows * p.heads; which += b.parts * kWarps) {
    const Head<kPairs> x = reader.head(p.x, which);
    Head<kPairs> grad = reader.head(b.grad, which);
    grad.template rotate<-1>(reader.tables(which));
    const float scale = reader.scale(x);
    grad_weight.combine(1.f, scale, grad.times(x));
    Head<kPairs> grad_x = grad.times(weight);
    grad_x.combine(scale, -scale * scale * scale * grad_x.dot(x) / p.head_dim, x);
    grad_x.write(static_cast<T*>(b.grad_x) + which * p.head_dim, reader.half);
  }
  grad_weight.write(sums[warp], reader.half);
  __syncthreads();
  for (int i = threadIdx.x; i < p.head_dim; i += 32 * kWarps) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][i];
    static_cast<float*>(b.grad_weight)[blockIdx.x * p.head_dim + i] = sum;
  }
}

// Calls launch<T, kPairs>(stream) with as many pairs a lane as the head needs.
template <class Launch>
const char* launch_heads(const RotateHeadsParams& params, void* stream, Launch&& launch) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    if (params.head_dim <= 64) return launch.template operator()<T, 1>(stream);
    if (params.head_dim <= 128) return launch.template operator()<T, 2>(stream);
    if (params.head_dim <= 256) return launch.template operator()<T, 4>(stream);
    return launch.template operator()<T, 8>(stream);
  });
}

}  // namespace
}  // namespace device

const char* rotate_heads_sm80(const RotateHeadsParams& params, void* stream) {
  return device::launch_heads(params, stream, [&]<class T, int kPairs>(cudaStream_t stream) {
    const int64_t heads = params.rows * params.heads;
    LaunchShape shape{.blocks = (heads + device::kWarps - 1) / device::kWarps, .threads = 32 * device::kWarps};
    return launch_layer_kernel(device::rotate_heads_sm80<T, kPairs>, shape, stream, params);
  });
}

const char* rotate_heads_backward_sm80(const RotateHeadsBackwardParams& params, void* stream) {
  return device::launch_heads(params.forward, stream, [&]<class T, int kPairs>(cudaStream_t stream) {
    LaunchShape shape{.blocks = params.parts, .threads = 32 * device::kWarps};
    return launch_layer_kernel(device::rotate_heads_backward_sm80<T, kPairs>, shape, stream, params);
  });
}

}  // namespace dflash
