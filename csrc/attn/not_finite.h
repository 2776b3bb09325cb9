// Values (of V) that are not finite, in tiles that some rows do not see in full. In a matrix product such a value makes
// every row NaN, even with a weight of zero. Decoding therefore adds it to the rows that see it, and replaces it by
// zero before the product.
#pragma once

#include <type_traits>

#include "attn/softmax.h"
#include "common/named_barrier.h"
#include "common/shared_memory.h"

namespace dflash::DFLASH_ISA {

// Returns a mask of the halves of a word that are not finite.
template <class T>
DFLASH_INLINE uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c007c00 : 0x7f807f80;
  return __vcmpeq2(pair & kExponent, kExponent);
}

// Handles one tile of values, which are the `bytes` of shared memory from `values` on. kThreads threads of the block
// call this, by default its first; `thread` is a thread's number among them. Each holds two rows, with their `bounds`,
// and their output `out` as an accumulator (common/mma.h). pair_at(key, fragment) is where the thread's two columns of a
// fragment of 8 lie. Returns whether a value was replaced; the caller must then order these writes before its reads.
template <class T, int kKeys, int kThreads, int kCount, class PairAt>
DFLASH_INLINE bool set_aside(uint32_t values, int bytes, int first_key, const RowBounds (&bounds)[2],
                             float (&out)[kCount], int barrier, PairAt pair_at, int thread = threadIdx.x) {
  const auto bad_of = [](uint4 v) {
    return uint4{not_finite<T>(v.x), not_finite<T>(v.y), not_finite<T>(v.z), not_finite<T>(v.w)};
  };
  bool found = false;
#pragma unroll 2
  for (int at = thread * 16; at < bytes; at += kThreads * 16) {
    const uint4 bad = bad_of(read_shared(values + at));
    found |= (bad.x | bad.y | bad.z | bad.w) != 0;
  }
  if (!named_barrier_any(barrier, kThreads, found)) return false;
#pragma unroll 1
  for (int key = 0; key < kKeys; ++key) {
    const bool seen[2] = {bounds[0].sees(first_key + key), bounds[1].sees(first_key + key)};
#pragma unroll
    for (int fragment = 0; fragment < kCount / 4; ++fragment) {
      uint32_t pair;
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(pair_at(key, fragment)) : "memory");
      const uint32_t bad = not_finite<T>(pair);
      if (bad == 0) continue;
      const T* const value = reinterpret_cast<const T*>(&pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (bad >> 16 * (i % 2) & 1 && seen[i / 2]) out[fragment * 4 + i] += to_float(value[i % 2]);
      }
    }
  }
  named_barrier_any(barrier, kThreads, false);
#pragma unroll 1
  for (int at = thread * 16; at < bytes; at += kThreads * 16) {
    const uint4 value = read_shared(values + at), bad = bad_of(value);
    write_shared(values + at, {value.x & ~bad.x, value.y & ~bad.y, value.z & ~bad.z, value.w & ~bad.w});
  }
  return true;
}

}  // namespace dflash::DFLASH_ISA
