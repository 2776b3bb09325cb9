// Writes projections to the caches as keys and values, on any GPU since Ampere: bias, norms and rotary embedding. A
// warp takes heads of one token in batches, and loads the next batch before it works on one.
//
// Element i of a head becomes x[i] * cosine[i] + x[partner[i]] * sine[i]. A lane's elements are the same in every head,
// so it keeps these three in registers; they change with the layer at most.
#include <type_traits>

#include "common/dependent_launch.h"
#include "common/dispatch.h"
#include "common/gpu.h"
#include "kv/kernels.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Layers that one launch serves: their caches' addresses are parameters of the kernel.
constexpr int kLayersAtOnce = 24;
constexpr int64_t kEnoughBlocks = 2048;

struct KvWriteLaunch {
  KvWriteParams params;
  int first_layer, layers, parts, batches;  // blocks of one token; batches of a warp
  bool aligned_stores;
  KvCache k[kLayersAtOnce], v[kLayersAtOnce];
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

DFLASH_INLINE float element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::kFloat16: return to_float(static_cast<const __half*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

// A head's elements are dealt to the lanes in steps of 32 * kVector, kVector neighbours each. A warp takes kHeads heads.
template <class T, int kVector, int kSteps, int kHeads>
struct KvWriter {
  static constexpr int kElements = kVector * kSteps;
  static constexpr bool kWide = kVector == 4;
  using Part = std::conditional_t<kVector == 4, Four<T>, T>;
  static_assert(kVector == 4 || kVector == 1);

  const KvWriteLaunch& launch;
  const KvWriteParams& p;
  float* const stage;  // [kElements, 32], of this warp
  const int lane;
  int64_t token, slot, outer;
  int layer_of_tables = -1, layer_of_gain = -1;
  float cosine[kElements], sine[kElements], gain[kElements];
  int partner[kElements];  // its place in `stage`

  DFLASH_INLINE KvWriter(const KvWriteLaunch& launch, float* stage)
      : launch(launch), p(launch.params), stage(stage), lane(threadIdx.x % 32) {}

  // The lane's i-th element of a head, and the place of any element in `stage`, where no two lanes share a bank.
  DFLASH_INLINE int index_of(int i) const { return i / kVector * 32 * kVector + lane * kVector + i % kVector; }
  DFLASH_INLINE static int place_of(int index) {
    const int step = index / (32 * kVector), rest = index % (32 * kVector);
    return (step * kVector + rest % kVector) * 32 + rest / kVector;
  }

  // Whether the token is written, and where.
  DFLASH_INLINE bool find_place() {
    slot = p.slots[token];
    if (slot < 0 || slot >= p.capacity) return false;
    // Neither tokens nor slots exceed 31 bits.
    outer = unsigned(token) / unsigned(p.length);
    if (p.block_table != nullptr) {
      const unsigned page = unsigned(slot) / unsigned(p.page_size);
      outer = p.block_table[outer * p.max_pages + page];
      slot -= page * p.page_size;
      return outer >= 0 && outer < p.pages;
    }
    return true;
  }

  DFLASH_INLINE void load_tables(int layer) {
    if (layer == layer_of_tables || (layer_of_tables >= 0 && p.by_layer == 0)) return;
    layer_of_tables = layer;
    const int64_t position = p.positions[token];
    const bool exists = position >= 0 && position < p.table_length;
    const int64_t row = layer * p.by_layer + position * p.angles;
    const float *cos = static_cast<const float*>(p.cos) + row, *sin = static_cast<const float*>(p.sin) + row;
    const int angles = int(p.angles);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int index = index_of(i);
      const bool is_rotated = index < 2 * angles;
      const bool is_first = p.rope_interleaved ? index % 2 == 0 : index < angles;
      const int angle = p.rope_interleaved ? index / 2 : is_first ? index : index - angles;
      const int other = p.rope_interleaved ? index ^ 1 : is_first ? index + angles : index - angles;
      partner[i] = place_of(is_rotated ? other : index);
      const bool is_read = is_rotated && exists;
      const float c = is_read ? cos[angle] : 1.0f, s = is_read ? sin[angle] : 0.0f;
      cosine[i] = exists ? c : __int_as_float(0x7fffffff);  // NaN
      sine[i] = is_first ? -s : s;
    }
  }

  DFLASH_INLINE void load_gain(int layer) {
    if (layer == layer_of_gain) return;
    layer_of_gain = layer;
    const float one = p.norm_plus_one ? 1.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int index = index_of(i);
      gain[i] = index < p.head_dim ? element(p.k_norm, p.k_norm_dtype, layer * p.head_dim + index) + one : 0.0f;
    }
  }

  // The RMS norm.
  DFLASH_INLINE void normalise(float (&x)[kElements], bool has_gain) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) squares += x[i] * x[i];
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) squares += __shfl_xor_sync(~0u, squares, mask);
    const float scale = rsqrtf(squares / float(p.head_dim) + float(p.norm_eps));
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] *= has_gain ? scale * gain[i] : scale;
  }

  DFLASH_INLINE void rotate(float (&x)[kElements]) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kElements; ++i) stage[i * 32 + lane] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = x[i] * cosine[i] + stage[partner[i]] * sine[i];
  }

  template <class Out>
  DFLASH_INLINE void store(const KvCache& cache, int head, const float (&x)[kElements]) const {
    Out* out = static_cast<Out*>(cache.base) + outer * cache.outer + head * cache.head + slot * cache.slot;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int index = index_of(step * kVector);
      if (index >= p.head_dim) break;
      if (kWide && launch.aligned_stores) {
        Four<Out> four;
#pragma unroll
        for (int k = 0; k < kVector; ++k) four.values[k] = from_float<Out>(x[step * kVector + k]);
        *reinterpret_cast<Four<Out>*>(out + index) = four;
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) out[index + k] = from_float<Out>(x[step * kVector + k]);
      }
    }
  }

  // Loads the heads from `first` on, of which there are `units`.
  DFLASH_INLINE void load(Part (&batch)[kHeads][kSteps], const T* projected, int first, int units) const {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int index = index_of(step * kVector);
        batch[h][step] = Part{};
        if (first + h < units && index < p.head_dim) {
          batch[h][step] = *reinterpret_cast<const Part*>(projected + int64_t(first + h) * p.head_dim + index);
        }
      }
    }
  }

  DFLASH_INLINE static void widen(float (&x)[kElements], const Part (&head)[kSteps]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kWide) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[step * kVector + k] = to_float(head[step].values[k]);
      } else {
        x[step] = to_float(head[step]);
      }
    }
  }

  DFLASH_INLINE void run() {
    const int heads = int(p.heads), units = launch.layers * 2 * heads;
    const int warp = blockIdx.x % launch.parts * kWarps + threadIdx.x / 32;
    const int begin = warp * launch.batches * kHeads, end = min(units, begin + launch.batches * kHeads);
    if (begin >= units) return;
    token = blockIdx.x / launch.parts;
    const int64_t start = (token * p.layers + launch.first_layer) * 2 * heads * p.head_dim;
    const T* projected = static_cast<const T*>(p.projected) + start;
    Part batch[kHeads][kSteps], next[kHeads][kSteps];
    load(next, projected, begin, end);
    if (!find_place()) return;
    for (int first = begin; first < end; first += kHeads) {
      memcpy(&batch, &next, sizeof(batch));
      load(next, projected, first + kHeads, end);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const int unit = first + h;
        if (unit >= end) break;
        float x[kElements];
        widen(x, batch[h]);
        finish(x, unit / heads / 2, unit / heads % 2 == 0, unit % heads);
      }
    }
  }

  DFLASH_INLINE void finish(float (&x)[kElements], int layer, bool is_key, int head) {
    const int64_t in_all = launch.first_layer + layer;
    if (p.bias != nullptr) {
      const int64_t start = ((in_all * 2 + !is_key) * p.heads + head) * p.head_dim;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (index_of(i) < p.head_dim) x[i] += element(p.bias, p.bias_dtype, start + index_of(i));
      }
    }
    if (is_key) {
      load_tables(int(in_all));
      if (p.k_norm != nullptr) load_gain(int(in_all));
      if (p.k_norm != nullptr && !p.norm_after_rope) normalise(x, true);
      rotate(x);
      if (p.k_norm != nullptr && p.norm_after_rope) normalise(x, true);
    } else if (p.v_norm) {
      normalise(x, false);
    }
    const KvCache& cache = is_key ? launch.k[layer] : launch.v[layer];
    switch (p.cache_dtype) {
      case DType::kBFloat16: return store<__nv_bfloat16>(cache, head, x);
      case DType::kFloat16: return store<__half>(cache, head, x);
      default: return store<float>(cache, head, x);
    }
  }
};

template <class T, int kVector, int kSteps, int kHeads>
__global__ void __launch_bounds__(kThreads) kv_write_sm80(const __grid_constant__ KvWriteLaunch launch) {
  using Writer = KvWriter<T, kVector, kSteps, kHeads>;
  __shared__ float stage[kWarps][Writer::kElements * 32];
#if __CUDA_ARCH__ >= 900
  wait_for_previous_kernel();
#endif
  Writer(launch, stage[threadIdx.x / 32]).run();
}

// Whether four neighbouring elements of every head of these caches can be stored at once.
bool stores_are_aligned(const KvCache* caches, int count, int64_t element_bytes) {
  for (int i = 0; i < count; ++i) {
    const KvCache& c = caches[i];
    if (reinterpret_cast<uintptr_t>(c.base) % (4 * element_bytes) || c.outer % 4 || c.head % 4 || c.slot % 4) return false;
  }
  return true;
}

template <class T, int kVector, int kSteps, int kHeads>
cudaError_t launch_all(const KvWriteParams& params, cudaStream_t stream) {
  const int64_t bytes = params.cache_dtype == DType::kFloat32 ? 4 : 2;
  cudaError_t status = cudaSuccess;
  for (int64_t first = 0; first < params.layers && status == cudaSuccess; first += kLayersAtOnce) {
    KvWriteLaunch launch{.params = params, .first_layer = int(first)};
    launch.layers = int(std::min<int64_t>(params.layers - first, kLayersAtOnce));
    // Many tokens give enough blocks, so that a warp takes more heads of one.
    const int64_t batches = (launch.layers * 2 * params.heads + kHeads * kWarps - 1) / (kHeads * kWarps);
    launch.batches = int(std::clamp<int64_t>(params.tokens * batches / kEnoughBlocks, 1, batches));
    launch.parts = int((batches + launch.batches - 1) / launch.batches);
    std::copy_n(params.k_caches + first, launch.layers, launch.k);
    std::copy_n(params.v_caches + first, launch.layers, launch.v);
    launch.aligned_stores = stores_are_aligned(launch.k, launch.layers, bytes) &&
                            stores_are_aligned(launch.v, launch.layers, bytes);
    const LaunchShape shape{.blocks = params.tokens * launch.parts,
                            .threads = kThreads,
                            .overlaps_previous = hopper_kernels_serve()};
    status = launch_kernel(kv_write_sm80<T, kVector, kSteps, kHeads>, shape, stream, launch);
  }
  return status;
}

}  // namespace
}  // namespace device

const char* kv_write_sm80(const KvWriteParams& params, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(params.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t dim = params.head_dim;
    const bool fours = dim % 4 == 0 && reinterpret_cast<uintptr_t>(params.projected) % (4 * sizeof(T)) == 0;
    if (!fours) return device::launch_all<T, 1, 16, 1>(params, stream);
    if (dim <= 128) return device::launch_all<T, 4, 1, 4>(params, stream);
    if (dim <= 256) return device::launch_all<T, 4, 2, 1>(params, stream);
    return device::launch_all<T, 4, 4, 1>(params, stream);
  });
}

}  // namespace dflash
