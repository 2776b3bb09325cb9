// Queries and keys get their norms and their rotary embedding, and keys and values go to the cache. A group of lanes
// computes one head of one row, and each lane 16 bytes of it. Heads of more than 32 x 16 bytes give a lane several.
#include <algorithm>
#include <bit>

#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 128;

// What a lane holds of a head: kChunks times 16 bytes, `lanes` times 16 bytes apart.
template <class T, int kChunks>
struct RotatedHead {
  static constexpr int kSize = Chunk<T>::kSize;
  using Values = float[kSize];

  const RotateToCacheParams& p;
  const int lanes;    // of a head, a power of two up to 32
  float* const head;  // shared memory of the group
  const int lane = threadIdx.x % lanes;
  Values x[kChunks];

  // The first element of chunk j, and whether the head has it.
  DFLASH_INLINE int at(int j) const { return (lane + j * lanes) * kSize; }
  DFLASH_INLINE bool has(int j) const { return at(j) < p.head_dim; }

  DFLASH_INLINE void read(const T* in) {
    const bool aligned = is_aligned(in);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (float& value : x[j]) value = 0;
      if (has(j)) load(x[j], in + at(j), aligned);
    }
  }

  DFLASH_INLINE void write(T* out) const {
    const bool aligned = is_aligned(out);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (has(j)) store(out + at(j), x[j], aligned);
    }
  }

  // All lanes of a warp call this. `gain` is null for a head that has no norm.
  DFLASH_INLINE void normalise(const T* gain) {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (const float value : x[j]) squares += value * value;
    }
    for (int mask = lanes / 2; mask > 0; mask >>= 1) squares += __shfl_xor_sync(~0u, squares, mask);
    if (gain == nullptr) return;
    const float scale = rsqrtf(squares / p.head_dim + float(p.eps)), one = p.plus_one ? 1.f : 0.f;
    const bool aligned = is_aligned(gain);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (!has(j)) continue;
      Values w;
      load(w, gain + at(j), aligned);
#pragma unroll
      for (int k = 0; k < kSize; ++k) x[j][k] *= scale * (w[k] + one);
    }
  }

  // All lanes of a warp call this. Element i turns together with i + angles.
  DFLASH_INLINE void rotate(int64_t position, bool rotates) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (has(j)) store_floats(head + at(j), x[j]);
    }
    __syncwarp();
    if (!rotates) return;
    const int angles = static_cast<int>(p.angles);
    const float* const cos = static_cast<const float*>(p.cos) + position * angles;
    const float* const sin = static_cast<const float*>(p.sin) + position * angles;
    const bool aligned = is_aligned(cos) && is_aligned(sin) && angles % kSize == 0;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int first = at(j);
      if (aligned) {
        if (first >= 2 * angles || !has(j)) continue;
        const bool is_second = first >= angles;
        const int angle = is_second ? first - angles : first;
        const float sign = is_second ? 1.f : -1.f;
        Values c, s, other;
        load_floats(c, cos + angle);
        load_floats(s, sin + angle);
        load_floats(other, head + (is_second ? angle : first + angles));
#pragma unroll
        for (int k = 0; k < kSize; ++k) x[j][k] = x[j][k] * c[k] + sign * other[k] * s[k];
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const int i = first + k;
          if (i >= 2 * angles) break;
          const bool is_second = i >= angles;
          const int angle = is_second ? i - angles : i;
          const float other = head[is_second ? angle : i + angles];
          x[j][k] = x[j][k] * cos[angle] + (is_second ? other : -other) * sin[angle];
        }
      }
    }
  }

  DFLASH_INLINE static void load_floats(Values& out, const float* from) {
#pragma unroll
    for (int k = 0; k < kSize; k += 4) {
      const auto four = *reinterpret_cast<const float4*>(from + k);
      out[k] = four.x, out[k + 1] = four.y, out[k + 2] = four.z, out[k + 3] = four.w;
    }
  }
  DFLASH_INLINE static void store_floats(float* to, const Values& in) {
#pragma unroll
    for (int k = 0; k < kSize; k += 4) {
      *reinterpret_cast<float4*>(to + k) = make_float4(in[k], in[k + 1], in[k + 2], in[k + 3]);
    }
  }
};

template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads) rotate_to_cache_sm80(const RotateToCacheParams p, const int lanes) {
  __shared__ __align__(16) float heads[kThreads * kChunks * Chunk<T>::kSize];
  const unsigned each = p.heads + 2 * p.kv_heads, count = p.entries * p.rows * each;
  const unsigned group = threadIdx.x / lanes, at = blockIdx.x * (kThreads / lanes) + group;
  const bool exists = at < count;
  const unsigned row_of_all = exists ? at / each : 0, which = exists ? at - row_of_all * each : 0;
  const unsigned entry = row_of_all / static_cast<unsigned>(p.rows);
  const unsigned row = row_of_all - entry * static_cast<unsigned>(p.rows);
  const bool is_query = which < p.heads, is_key = !is_query && which < p.heads + p.kv_heads;
  RotatedHead<T, kChunks> head{p, lanes, heads + group * lanes * kChunks * Chunk<T>::kSize};

  overlap_with_neighbours();
  const int64_t place = p.places[row_of_all], cache = p.caches[entry];
  int64_t position = p.positions[row_of_all];
  head.read(static_cast<const T*>(p.projected) + (int64_t(row_of_all) * each + which) * p.head_dim);
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
    head.normalise(static_cast<const T*>(is_query ? p.q_norm : is_key ? p.k_norm : nullptr));
  }
  position = max(int64_t(0), min(position, p.positions_count - 1));
  head.rotate(position, is_query || is_key);

  const bool is_kept = 0 <= place && place < p.capacity && 0 <= cache && cache < p.cache_count;
  if (!exists || !(is_query || is_kept)) return;
  const HeadRows& to = is_query ? p.queries : is_key ? p.keys : p.values;
  const int64_t first = is_query ? 0 : is_key ? p.heads : p.heads + p.kv_heads;
  head.write(static_cast<T*>(to.base) + (is_query ? entry : cache) * to.entry + (which - first) * to.head +
             (is_query ? row : place) * to.row);
}

}  // namespace
}  // namespace device

const char* rotate_to_cache_sm80(const RotateToCacheParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t chunks = params.head_dim / device::Chunk<T>::kSize;
    const int lanes = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(chunks, 32))));
    const int64_t heads = params.entries * params.rows * (params.heads + 2 * params.kv_heads);
    const int64_t of_block = device::kThreads / lanes;
    LaunchShape shape{.blocks = (heads + of_block - 1) / of_block, .threads = device::kThreads};
    if (chunks <= 32) return launch_layer_kernel(device::rotate_to_cache_sm80<T, 1>, shape, stream, params, lanes);
    return launch_layer_kernel(device::rotate_to_cache_sm80<T, 4>, shape, stream, params, lanes);
  });
}

}  // namespace dflash
