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

// ex2.approx.ftz: e^x. Results below the smallest normal number are 0.
DFLASH_INLINE float exp_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
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

// The two numbers of 16 bits in a word as floats, the lower half first.
template <class T>
DFLASH_INLINE void unpack(float& low, float& high, uint32_t word) {
  if constexpr (requires(T t) { __bfloat162float(t); }) {
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = both.x, high = both.y;
  }
}

// cvt.rn.bf16x2 or cvt.rn.f16x2: two floats, rounded, the first in the lower half.
template <class T>
DFLASH_INLINE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (requires(T t) { __bfloat162float(t); }) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

DFLASH_INLINE bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Loads kCount neighbours, by one 16-byte access if they fill it and are aligned.
template <int kCount, class T>
DFLASH_INLINE void load(float (&out)[kCount], const T* p, bool aligned) {
  if constexpr (kCount == Chunk<T>::kSize) {
    if (aligned) {
      const uint4 words = *reinterpret_cast<const uint4*>(p);
      if constexpr (sizeof(T) == 4) {
        out[0] = __uint_as_float(words.x), out[1] = __uint_as_float(words.y);
        out[2] = __uint_as_float(words.z), out[3] = __uint_as_float(words.w);
      } else {
        unpack<T>(out[0], out[1], words.x), unpack<T>(out[2], out[3], words.y);
        unpack<T>(out[4], out[5], words.z), unpack<T>(out[6], out[7], words.w);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) out[k] = to_float(p[k]);
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

// st.global of 8 or 16 bytes, for places where the compiler would make several stores of an assignment.
DFLASH_INLINE void write_global(void* p, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b) : "memory");
}
DFLASH_INLINE void write_global(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// prefetch.global.L2: loads a line into the L2 cache. What the memory holds may still change before it is read.
DFLASH_INLINE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Adds four floats to 16 aligned bytes of global memory: by one red.global.add where there is one (sm_90).
DFLASH_INLINE void red_add_v4(float* sums, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
#else
  atomicAdd(sums, a);
  atomicAdd(sums + 1, b);
  atomicAdd(sums + 2, c);
  atomicAdd(sums + 3, d);
#endif
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
