// For CUDA: an attention head in the registers of a few neighbouring lanes, on its way from the projections to a cache.
#pragma once

#include <type_traits>

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// kLanes lanes of a warp share a head of at most kWidth elements, whose number is a multiple of kVector. In each step a
// lane has kVector neighbours, one, four or eight. Lanes beyond the head's end have zeros. All lanes of the warp call
// norm_scale and rotate together.
template <int kVector, int kSteps, int kLanes>
struct HeadLanes {
  static constexpr int kElements = kVector * kSteps, kWidth = kElements * kLanes;

  float* const stage;  // kWidth floats of shared memory, which no other lanes use
  const int head_dim;
  const int lane = threadIdx.x % kLanes;

  // A lane's elements as they lie in memory, which must be aligned to 16 bytes, or to kVector elements.
  template <class T>
  struct Packed {
    static constexpr int kBytes = kVector * sizeof(T);
    using Part = std::conditional_t<kVector == 1, T, std::conditional_t<kBytes == 8, uint2, uint4>>;
    static constexpr int kParts = kBytes / sizeof(Part);
    Part parts[kSteps][kParts];
  };

  // The index of the first element of a step.
  DFLASH_INLINE int first_of(int step) const { return (step * kLanes + lane) * kVector; }

  template <class T>
  DFLASH_INLINE Packed<T> load(const T* head) const {
    using P = Packed<T>;
    P packed{};
#pragma unroll
    for (int i = 0; i < kSteps * P::kParts; ++i) {
      const int first = first_of(i / P::kParts);
      const auto* parts = reinterpret_cast<const typename P::Part*>(head + first);
      if (first < head_dim) packed.parts[i / P::kParts][i % P::kParts] = parts[i % P::kParts];
    }
    return packed;
  }

  template <class T>
  DFLASH_INLINE void widen(float (&x)[kElements], const Packed<T>& packed) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const auto& part = packed.parts[i / kVector];
      const auto* words = reinterpret_cast<const uint32_t*>(part);
      if constexpr (kVector == 1) {
        x[i] = to_float(part[0]);
      } else if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(words[i % kVector]);
      } else if (i % 2 == 0) {
        unpack<T>(x[i], x[i + 1], words[i % kVector / 2]);
      }
    }
  }

  template <class T>
  DFLASH_INLINE void store(T* head, const float (&x)[kElements]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      T* const to = head + first_of(step);
      const float* from = x + step * kVector;
      if (first_of(step) >= head_dim) return;
      if constexpr (kVector == 1) {
        *to = from_float<T>(*from);
      } else if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kVector; i += 4) {
          write_global(to + i, __float_as_uint(from[i]), __float_as_uint(from[i + 1]), __float_as_uint(from[i + 2]),
                       __float_as_uint(from[i + 3]));
        }
      } else if constexpr (kVector == 4) {
        write_global(to, pack<T>(from[0], from[1]), pack<T>(from[2], from[3]));
      } else {
        write_global(to, pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]),
                     pack<T>(from[6], from[7]));
      }
    }
  }

  // 1 / rms, the factor of an RMS norm.
  DFLASH_INLINE float norm_scale(const float (&x)[kElements], float eps) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) squares += x[i] * x[i];
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(~0u, squares, distance);
    return rsqrtf(squares * (1.0f / float(head_dim)) + eps);
  }

  // Element i becomes x[i] * cosine[i] + x[partner of i] * sine[i]. The partners of neighbours are neighbours.
  struct Rotation {
    float cosine[kElements], sine[kElements];
    int partner[kSteps];  // of the first element of a step
    bool swaps_neighbours;
  };

  // The pairs (i, angles + i) are rotated by the angles whose cos and sin are given, or the pairs (2 * i, 2 * i + 1) if
  // they are interleaved. `angles` is a multiple of kVector, and cos and sin are as aligned as heads are.
  DFLASH_INLINE Rotation rotation(const float* cos, const float* sin, int angles, bool interleaved) const {
    Rotation rotation;
    rotation.swaps_neighbours = interleaved && kVector > 1;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int first = first_of(step);
      const bool is_rotated = first < 2 * angles, is_first = interleaved ? first % 2 == 0 : first < angles;
      rotation.partner[step] = !is_rotated ? first : interleaved ? first ^ 1 : is_first ? first + angles : first - angles;
      float c[kVector], s[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) c[i] = 1, s[i] = 0;
      if (is_rotated && interleaved) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) c[i] = cos[(first + i) / 2], s[i] = sin[(first + i) / 2];
      } else if (is_rotated) {
        take(c, cos + (is_first ? first : first - angles));
        take(s, sin + (is_first ? first : first - angles));
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool is_negative = rotation.swaps_neighbours ? i % 2 == 0 : is_first;
        rotation.cosine[step * kVector + i] = c[i];
        rotation.sine[step * kVector + i] = is_negative ? -s[i] : s[i];
      }
    }
    return rotation;
  }

  DFLASH_INLINE void rotate(float (&x)[kElements], const Rotation& rotation) const {
    float other[kSteps][kVector];
    if (rotation.swaps_neighbours) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) other[i / kVector][i % kVector] = x[kVector > 1 ? i ^ 1 : i];
    } else {
      __syncwarp();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) put(stage + first_of(step), x + step * kVector);
      __syncwarp();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        take(other[step], stage + (first_of(step) < head_dim ? rotation.partner[step] : 0));
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      x[i] = x[i] * rotation.cosine[i] + other[i / kVector][i % kVector] * rotation.sine[i];
    }
  }

 private:
  // Copy neighbours, 16 bytes at once.
  DFLASH_INLINE static void put(float* to, const float* x) {
    if constexpr (kVector == 1) {
      *to = *x;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) *reinterpret_cast<float4*>(to + i) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    }
  }
  DFLASH_INLINE static void take(float (&x)[kVector], const float* from) {
    if constexpr (kVector == 1) {
      x[0] = *from;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
      }
    }
  }
};

}  // namespace dflash::DFLASH_ISA
