// Queries and keys get their norms and their rotary embedding, and keys and values go to the cache. A warp computes one
// head of one row.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeadDim = 512;

template <class T>
struct RotatedHead {
  const RotateToCacheParams& p;
  float* head;  // shared memory of this warp
  const int lane = threadIdx.x % 32;

  DFLASH_INLINE void normalise(const T* gain) const {
    float squares = 0;
    for (int i = lane; i < p.head_dim; i += 32) squares += head[i] * head[i];
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) squares += __shfl_xor_sync(~0u, squares, mask);
    const float scale = rsqrtf(squares / p.head_dim + float(p.eps)), one = p.plus_one ? 1.f : 0.f;
    for (int i = lane; i < p.head_dim; i += 32) head[i] *= scale * (to_float(gain[i]) + one);
    __syncwarp();
  }

  DFLASH_INLINE void rotate(int64_t position) const {
    const float* cos = static_cast<const float*>(p.cos) + position * p.angles;
    const float* sin = static_cast<const float*>(p.sin) + position * p.angles;
    for (int i = lane; i < p.angles; i += 32) {
      const float first = head[i], second = head[i + p.angles];
      head[i] = first * cos[i] - second * sin[i];
      head[i + p.angles] = second * cos[i] + first * sin[i];
    }
    __syncwarp();
  }

  DFLASH_INLINE void run(int64_t row_of_all, int64_t which) const {
    const int64_t entry = row_of_all / p.rows, row = row_of_all % p.rows;
    const bool is_query = which < p.heads, is_key = !is_query && which < p.heads + p.kv_heads;
    const int64_t place = p.places[row_of_all], cache = p.caches[entry];
    const bool is_kept = 0 <= place && place < p.capacity && 0 <= cache && cache < p.cache_count;
    if (!is_query && !is_kept) return;
    const T* in = static_cast<const T*>(p.projected) +
                  (row_of_all * (p.heads + 2 * p.kv_heads) + which) * p.head_dim;
    for (int i = lane; i < p.head_dim; i += 32) head[i] = to_float(in[i]);
    __syncwarp();
    if (is_query || is_key) {
      const T* gain = static_cast<const T*>(is_query ? p.q_norm : p.k_norm);
      if (gain) normalise(gain);
      const int64_t position = p.positions[row_of_all];
      rotate(position < 0 ? 0 : position < p.positions_count ? position : p.positions_count - 1);
    }
    const HeadRows& to = is_query ? p.queries : is_key ? p.keys : p.values;
    const int64_t first = is_query ? 0 : is_key ? p.heads : p.heads + p.kv_heads;
    T* out = static_cast<T*>(to.base) + (is_query ? entry : cache) * to.entry + (which - first) * to.head +
             (is_query ? row : place) * to.row;
    for (int i = lane; i < p.head_dim; i += 32) out[i] = from_float<T>(head[i]);
  }
};

template <class T>
__global__ void __launch_bounds__(32 * kWarps) rotate_to_cache_sm80(const RotateToCacheParams params) {
  __shared__ float heads[kWarps][kMaxHeadDim];
  overlap_with_neighbours();
  const int warp = threadIdx.x / 32;
  const int64_t each = params.heads + 2 * params.kv_heads, i = int64_t(blockIdx.x) * kWarps + warp;
  if (i < params.entries * params.rows * each) RotatedHead<T>{params, heads[warp]}.run(i / each, i % each);
}

}  // namespace
}  // namespace device

const char* rotate_to_cache_sm80(const RotateToCacheParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t heads = params.entries * params.rows * (params.heads + 2 * params.kv_heads);
    LaunchShape shape{.blocks = (heads + device::kWarps - 1) / device::kWarps, .threads = 32 * device::kWarps};
    return launch_layer_kernel(device::rotate_to_cache_sm80<T>, shape, stream, params);
  });
}

}  // namespace dflash
