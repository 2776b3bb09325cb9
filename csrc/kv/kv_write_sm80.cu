// Writes projections to the caches as keys and values, on any GPU since Ampere: bias, norms and rotary embedding. A few
// lanes of a warp take one head of a token after another, and load the next before they work on one.
#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "common/gpu.h"
#include "common/head_lanes.h"
#include "kv/kernels.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 128;
// Layers that one launch serves: their caches' addresses are parameters of the kernel.
constexpr int kLayersAtOnce = 24;
constexpr int64_t kEnoughBlocks = 1536;

struct KvWriteLaunch {
  KvWriteParams params;
  float norm_eps;
  int first_layer, layers, parts;  // blocks of one token
  KvCache k[kLayersAtOnce], v[kLayersAtOnce];
};

template <class T, class Lanes>
struct KvWriter {
  static constexpr int kElements = Lanes::kElements;

  const KvWriteLaunch& launch;
  const KvWriteParams& p;
  const Lanes lanes;
  unsigned token, slot, outer;  // none of them exceeds 31 bits
  int layer_of_tables = -1;
  typename Lanes::Rotation rotation;

  DFLASH_INLINE KvWriter(const KvWriteLaunch& launch, float* stage)
      : launch(launch), p(launch.params), lanes{stage, int(launch.params.head_dim)} {}

  // Whether the token is written, and where.
  DFLASH_INLINE bool find_place() {
    const int64_t wanted = p.slots[token];
    if (wanted < 0 || wanted >= p.capacity) return false;
    slot = unsigned(wanted);
    outer = token / unsigned(p.length);
    if (p.block_table == nullptr) return true;
    const unsigned page = slot / unsigned(p.page_size);
    outer = p.block_table[outer * p.max_pages + page];
    slot -= page * unsigned(p.page_size);
    return outer < p.pages;  // a negative page is a large number
  }

  DFLASH_INLINE void load_tables(int layer) {
    if (layer == layer_of_tables || (layer_of_tables >= 0 && p.by_layer == 0)) return;
    layer_of_tables = layer;
    const int64_t position = p.positions[token];
    const bool exists = position >= 0 && position < p.table_length;
    const int64_t row = layer * p.by_layer + position * p.angles;
    rotation = lanes.rotation(static_cast<const float*>(p.cos) + row, static_cast<const float*>(p.sin) + row,
                              exists ? int(p.angles) : 0, p.rope_interleaved);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (!exists) rotation.cosine[i] = __int_as_float(0x7fffffff);  // NaN
    }
  }

  // A head of weights, of any dtype.
  DFLASH_INLINE void read(float (&x)[kElements], const void* weights, DType dtype, int64_t start) const {
    const auto read_as = [&](auto type) {
      const auto* head = static_cast<const decltype(type)*>(weights) + start;
      lanes.widen(x, lanes.load(head));
    };
    switch (dtype) {
      case DType::kBFloat16: return read_as(__nv_bfloat16());
      case DType::kFloat16: return read_as(__half());
      default: return read_as(float());
    }
  }

  DFLASH_INLINE void normalise(float (&x)[kElements], const float (&gain)[kElements]) const {
    const float scale = lanes.norm_scale(x, launch.norm_eps);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] *= scale * gain[i];
  }

  DFLASH_INLINE void finish_key(float (&x)[kElements], int layer) {
    load_tables(layer);
    if (p.k_norm == nullptr) return lanes.rotate(x, rotation);
    float gain[kElements];
    read(gain, p.k_norm, p.k_norm_dtype, layer * p.head_dim);
    const float one = p.norm_plus_one ? 1.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) gain[i] += one;
    if (!p.norm_after_rope) normalise(x, gain);
    lanes.rotate(x, rotation);
    if (p.norm_after_rope) normalise(x, gain);
  }

  // half: twice the layer of this launch, and one more for values
  DFLASH_INLINE void finish(float (&x)[kElements], unsigned half, unsigned head) {
    const unsigned layer = half / 2;
    const bool is_key = half % 2 == 0;
    if (p.bias != nullptr) {
      float bias[kElements];
      read(bias, p.bias, p.bias_dtype, ((launch.first_layer * 2 + half) * p.heads + head) * p.head_dim);
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[i] += bias[i];
    }
    if (is_key) {
      finish_key(x, launch.first_layer + int(layer));
    } else if (p.v_norm) {
      const float scale = lanes.norm_scale(x, launch.norm_eps);
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[i] *= scale;
    }
    const KvCache& cache = is_key ? launch.k[layer] : launch.v[layer];
    const int64_t place = outer * cache.outer + head * cache.head + slot * cache.slot;
    switch (p.cache_dtype) {
      case DType::kBFloat16: return lanes.store(static_cast<__nv_bfloat16*>(cache.base) + place, x);
      case DType::kFloat16: return lanes.store(static_cast<__half*>(cache.base) + place, x);
      default: return lanes.store(static_cast<float*>(cache.base) + place, x);
    }
  }

  // The lanes take every `step`-th of a token's heads, K and V of all layers counted.
  DFLASH_INLINE void run(unsigned first, unsigned step) {
    const unsigned heads = p.heads, all = launch.layers * 2 * heads;
    if (first >= all) return;
    const int64_t start = (token * p.layers + launch.first_layer) * 2 * heads + first;
    const T* projected = static_cast<const T*>(p.projected) + start * p.head_dim;
    const int64_t stride = step * p.head_dim;
    auto next = lanes.load(projected);
    if (!find_place()) return;
    const unsigned halves = step / heads, rest = step % heads;
    unsigned half = first / heads, head = first % heads;
    for (unsigned i = first; i < all; i += step) {
      float x[kElements];
      lanes.widen(x, next);
      projected += stride;
      if (i + step < all) next = lanes.load(projected);
      finish(x, half, head);
      half += halves;
      head += rest;
      if (head >= heads) head -= heads, ++half;
    }
  }

};

template <class T, int kVector, int kSteps, int kLanes>
__global__ void __launch_bounds__(kThreads) kv_write_sm80(const __grid_constant__ KvWriteLaunch launch) {
  using Lanes = HeadLanes<kVector, kSteps, kLanes>;
  constexpr int kGroups = kThreads / kLanes;
  __shared__ __align__(16) float stage[kGroups][Lanes::kWidth];
#if __CUDA_ARCH__ >= 900
  wait_for_previous_kernel();
#endif
  const unsigned group = threadIdx.x / kLanes;
  KvWriter<T, Lanes> writer(launch, stage[group]);
  writer.token = blockIdx.x / launch.parts;
  writer.run(blockIdx.x % launch.parts * kGroups + group, launch.parts * kGroups);
}

template <class T, int kVector, int kSteps, int kLanes>
cudaError_t launch_all(const KvWriteParams& params, cudaStream_t stream) {
  constexpr int kGroups = kThreads / kLanes;
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < params.layers && status == cudaSuccess; first += kLayersAtOnce) {
    KvWriteLaunch launch{.params = params, .norm_eps = float(params.norm_eps), .first_layer = int(first)};
    launch.layers = int(std::min<int64_t>(params.layers - first, kLayersAtOnce));
    // Many tokens give enough blocks, so that the lanes take more heads of one.
    const int64_t most = (launch.layers * 2 * params.heads + kGroups - 1) / kGroups;
    launch.parts = int(std::clamp<int64_t>((kEnoughBlocks + params.tokens - 1) / params.tokens, 1, most));
    std::copy_n(params.k_caches + first, launch.layers, launch.k);
    std::copy_n(params.v_caches + first, launch.layers, launch.v);
    const LaunchShape shape{.blocks = params.tokens * launch.parts,
                            .threads = kThreads,
                            .overlaps_previous = hopper_kernels_serve()};
    status = launch_kernel(kv_write_sm80<T, kVector, kSteps, kLanes>, shape, stream, launch);
  }
  return status;
}

// Whether heads can be read and written eight elements at a time, at multiples of 16 bytes.
bool takes_vectors(const KvWriteParams& p) {
  const auto is_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const auto is_cache_aligned = [&](const KvCache& cache) {
    return is_aligned(cache.base) && cache.outer % 8 == 0 && cache.head % 8 == 0 && cache.slot % 8 == 0;
  };
  return p.head_dim % 8 == 0 && p.angles % 8 == 0 && is_aligned(p.projected) && is_aligned(p.bias) &&
         is_aligned(p.k_norm) && is_aligned(p.cos) && is_aligned(p.sin) &&
         std::all_of(p.k_caches, p.k_caches + p.layers, is_cache_aligned) &&
         std::all_of(p.v_caches, p.v_caches + p.layers, is_cache_aligned);
}

}  // namespace
}  // namespace device

const char* kv_write_sm80(const KvWriteParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    if (!device::takes_vectors(params)) return device::launch_all<T, 1, 16, 32>(params, stream);
    // All heads of a warp are keys, or all are values.
    if (params.head_dim <= 64 && params.heads % 4 == 0) return device::launch_all<T, 8, 1, 8>(params, stream);
    if (params.head_dim <= 128 && params.heads % 2 == 0) return device::launch_all<T, 8, 1, 16>(params, stream);
    if (params.head_dim <= 256) return device::launch_all<T, 8, 1, 32>(params, stream);
    return device::launch_all<T, 8, 2, 32>(params, stream);
  });
}

}  // namespace dflash
