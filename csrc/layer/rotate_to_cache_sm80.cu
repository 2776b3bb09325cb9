// Queries and keys get their norms and their rotary embedding, and keys and values go to the cache. A few lanes of a
// warp compute one head of one row.
#include <algorithm>

#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "common/head_lanes.h"
#include "layer/launch.h"
#include "layer/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 128;

template <class T, int kVector, int kSteps, int kLanes>
__global__ void __launch_bounds__(kThreads) rotate_to_cache_sm80(const __grid_constant__ RotateToCacheParams p) {
  using Lanes = HeadLanes<kVector, kSteps, kLanes>;
  constexpr int kGroups = kThreads / kLanes;
  __shared__ __align__(16) float stage[kGroups][Lanes::kWidth];
  const unsigned each = p.heads + 2 * p.kv_heads, count = p.entries * p.rows * each;
  const unsigned group = threadIdx.x / kLanes, at = blockIdx.x * kGroups + group;
  const bool exists = at < count;
  const unsigned row_of_all = exists ? at / each : 0, which = exists ? at - row_of_all * each : 0;
  const unsigned entry = row_of_all / static_cast<unsigned>(p.rows);
  const unsigned row = row_of_all - entry * static_cast<unsigned>(p.rows);
  const bool is_query = which < p.heads, is_key = !is_query && which < p.heads + p.kv_heads;
  const Lanes lanes{stage[group], int(p.head_dim)};

  overlap_with_neighbours();
  const int64_t place = p.places[row_of_all], cache = p.caches[entry];
  const int64_t position = max(int64_t(0), min(p.positions[row_of_all], p.positions_count - 1));
  float x[Lanes::kElements];
  lanes.widen(x, lanes.load(static_cast<const T*>(p.projected) + row_of_all * p.stride + which * p.head_dim));
  const T* const norm = static_cast<const T*>(is_query ? p.q_norm : is_key ? p.k_norm : nullptr);
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
    const float scale = lanes.norm_scale(x, float(p.eps)), one = p.plus_one ? 1.f : 0.f;
    if (norm != nullptr) {
      float gain[Lanes::kElements];
      lanes.widen(gain, lanes.load(norm));
#pragma unroll
      for (int i = 0; i < Lanes::kElements; ++i) x[i] *= scale * (gain[i] + one);
    }
  }
  // Values turn by no angle.
  const int64_t first_angle = position * p.angles;
  lanes.rotate(x, lanes.rotation(static_cast<const float*>(p.cos) + first_angle,
                                 static_cast<const float*>(p.sin) + first_angle,
                                 is_query || is_key ? int(p.angles) : 0, false));

  const bool is_kept = 0 <= place && place < p.capacity && 0 <= cache && cache < p.cache_count;
  if (!exists || !(is_query || is_kept)) return;
  const HeadRows& to = is_query ? p.queries : is_key ? p.keys : p.values;
  const int64_t first = is_query ? 0 : is_key ? p.heads : p.heads + p.kv_heads;
  lanes.store(static_cast<T*>(to.base) + (is_query ? entry : cache) * to.entry + (which - first) * to.head +
                  (is_query ? row : place) * to.row,
              x);
}

template <class T, int kVector, int kSteps, int kLanes>
cudaError_t launch_rotation(const RotateToCacheParams& params, cudaStream_t stream) {
  constexpr int kGroups = kThreads / kLanes;
  const int64_t heads = params.entries * params.rows * (params.heads + 2 * params.kv_heads);
  const LaunchShape shape{.blocks = (heads + kGroups - 1) / kGroups, .threads = kThreads};
  return launch_layer_kernel(rotate_to_cache_sm80<T, kVector, kSteps, kLanes>, shape, stream, params);
}

// Whether heads can be read and written eight elements at a time, at multiples of 16 bytes.
bool takes_vectors(const RotateToCacheParams& p) {
  const auto are_aligned = [](auto... data) { return (... && (reinterpret_cast<uintptr_t>(data) % 16 == 0)); };
  const auto are_rows_aligned = [&](const HeadRows& rows) {
    return are_aligned(rows.base) && rows.entry % 8 == 0 && rows.head % 8 == 0 && rows.row % 8 == 0;
  };
  return p.head_dim % 8 == 0 && p.stride % 8 == 0 && p.angles % 8 == 0 && are_aligned(p.projected, p.q_norm, p.k_norm, p.cos, p.sin) &&
         are_rows_aligned(p.queries) && are_rows_aligned(p.keys) && are_rows_aligned(p.values);
}

}  // namespace
}  // namespace device

const char* rotate_to_cache_sm80(const RotateToCacheParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    if (!device::takes_vectors(params)) return device::launch_rotation<T, 1, 16, 32>(params, stream);
    if (params.head_dim <= 64) return device::launch_rotation<T, 8, 1, 8>(params, stream);
    if (params.head_dim <= 128) return device::launch_rotation<T, 8, 1, 16>(params, stream);
    if (params.head_dim <= 256) return device::launch_rotation<T, 8, 1, 32>(params, stream);
    return device::launch_rotation<T, 8, 2, 32>(params, stream);
  });
}

}  // namespace dflash
