// What all CUDA kernels share: loads and stores of 16 bytes, reductions, arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DFLASH_ISA device
#define DFLASH_INLINE __device__ __forceinline__
#define DFLASH_MEMBER __device__ __forceinline__

namespace dflash::DFLASH_ISA {

constexpr float kInfinity = __builtin_inff();

DFLASH_INLINE float exp_of(float x) { return __expf(x); }
DFLASH_INLINE float log_of(float x) { return logf(x); }

DFLASH_INLINE float to_float(float x) { return x; }
DFLASH_INLINE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DFLASH_INLINE float to_float(__half x) { return __half2float(x); }

template <class T>
DFLASH_INLINE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (requires(T t) { __bfloat162float(t); }) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// As many elements as fit in 16 bytes.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

DFLASH_INLINE bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Loads kCount neighbours, by one 16-byte access if they fill it and are aligned.
template <int kCount, class T>
DFLASH_INLINE void load(float (&out)[kCount], const T* p, bool aligned) {
  if (kCount == Chunk<T>::kSize && aligned) {
    const auto chunk = *reinterpret_cast<const Chunk<T>*>(p);
#pragma unroll
    for (int k = 0; k < kCount; ++k) out[k] = to_float(chunk.values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) out[k] = to_float(p[k]);
  }
}

template <int kCount, class T>
DFLASH_INLINE void store(T* p, const float (&in)[kCount], bool aligned) {
  if (kCount == Chunk<T>::kSize && aligned) {
    Chunk<T> chunk;
#pragma unroll
    for (int k = 0; k < kCount; ++k) chunk.values[k] = from_float<T>(in[k]);
    *reinterpret_cast<Chunk<T>*>(p) = chunk;
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) p[k] = from_float<T>(in[k]);
  }
}

// prefetch.global.L2: loads a line into the L2 cache. What the memory holds may still change before it is read.
DFLASH_INLINE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// red.global.add: adds four floats to 16 aligned bytes of global memory (sm_90).
DFLASH_INLINE void red_add_v4(float* sums, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Returns another lane's copy of a struct of floats.
template <class S>
DFLASH_INLINE S shuffle_xor(const S& value, int lane_mask) {
  static_assert(sizeof(S) % 4 == 0);
  S other;
#pragma unroll
  for (int i = 0; i < int(sizeof(S) / 4); ++i) {
    reinterpret_cast<float*>(&other)[i] =
        __shfl_xor_sync(~0u, reinterpret_cast<const float*>(&value)[i], lane_mask);
  }
  return other;
}

// Merges the structs of all threads of a block by value.merge(other), and returns the result to every thread. All
// kThreads of them call this; kThreads is a multiple of 32 and at most 1024.
template <int kThreads, class S>
DFLASH_INLINE S block_merge(S value) {
  __shared__ float storage[kThreads / 32][sizeof(S) / 4];
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value.merge(shuffle_xor(value, mask));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) *reinterpret_cast<S*>(storage[warp]) = value;
  __syncthreads();
  S total = *reinterpret_cast<const S*>(storage[lane % (kThreads / 32)]);
  __syncthreads();
#pragma unroll
  for (int mask = kThreads / 64; mask > 0; mask >>= 1) total.merge(shuffle_xor(total, mask));
  return total;
}

}  // namespace dflash::DFLASH_ISA
