// Vectors of any width for the CPU kernels, through the compiler's vector extensions: one source, lowered to whatever
// instruction set the file is compiled for. Everything sits in a namespace named after that instruction set, and no
// standard-library template is used: otherwise the linker could keep an AVX-512 copy of a shared inline function.
#pragma once

#include <stdint.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/layout.h"

#ifndef DFLASH_ISA
#error "CPU kernels are compiled once per instruction set with -DDFLASH_ISA=<name>"
#endif
#define DFLASH_INLINE static inline __attribute__((always_inline))
#define DFLASH_MEMBER inline __attribute__((always_inline))
#define DFLASH_LAMBDA __attribute__((always_inline))

namespace dflash::DFLASH_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class Element, int kLanes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(sizeof(Element) * kLanes)));
};
template <class Element, int kLanes>
using Vector = typename VectorOf<Element, kLanes>::type;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class V>
constexpr int lanes_of = sizeof(V) / sizeof(V{}[0]);

constexpr float kInfinity = __builtin_inff();

template <class To, class From>
DFLASH_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Memory that is left uninitialised.
template <class Element>
class Array {
 public:
  explicit Array(int64_t count) : data_(new Element[count]) {}
  Array(const Array&) = delete;
  ~Array() { delete[] data_; }
  Element* data() const { return data_; }

 private:
  Element* data_;
};

// Calls f with a value of the type in memory and a value of the type of the arithmetic.
template <class F>
DFLASH_INLINE void with_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{}, float{});
    case DType::kFloat64: return f(double{}, double{});
    case DType::kBFloat16: return f(bfloat16{}, float{});
    case DType::kFloat16: return f(float16{}, float{});
  }
}

// ------------------------------------------------------------- loads and stores

template <class V, class T>
struct Memory;  // V: vector of float or double; T: element type in memory

template <class V>
struct Memory<V, float> {
  static DFLASH_MEMBER V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static DFLASH_MEMBER void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <class V>
struct Memory<V, double> {
  static DFLASH_MEMBER V load(const double* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static DFLASH_MEMBER void store(double* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <class V>
struct Memory<V, bfloat16> {
  using Narrow = Vector<uint16_t, lanes_of<V>>;
  using Wide = Vector<uint32_t, lanes_of<V>>;
  static DFLASH_MEMBER V load(const bfloat16* p) {
    Narrow bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return bits_as<V>(__builtin_convertvector(bits, Wide) << 16);
  }
  static DFLASH_MEMBER void store(bfloat16* p, V v) {
    const Wide bits = bits_as<Wide>(v);
    const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Narrow out = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Narrow);
    __builtin_memcpy(p, &out, sizeof(out));
  }
};

template <class V>
struct Memory<V, float16> {
  using Narrow = Vector<uint16_t, lanes_of<V>>;
  using Wide = Vector<uint32_t, lanes_of<V>>;
  static DFLASH_MEMBER V load(const float16* p) {
    Narrow bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    const Wide wide = __builtin_convertvector(bits, Wide);
    const Wide magnitude = (wide & 0x7fff) << 13;
    // The exponent is moved by a multiplication, which is right for subnormals as well.
    const Wide finite = bits_as<Wide>(bits_as<V>(magnitude) * 0x1p112f);
    const Wide special = magnitude | 0x7f800000;
    return bits_as<V>((magnitude >= 0x7c00u << 13 ? special : finite) | (wide & 0x8000) << 16);
  }
  static DFLASH_MEMBER void store(float16* p, V v) {
    const Wide bits = bits_as<Wide>(v);
    const Wide magnitude = bits & 0x7fffffff;
    Wide normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    normal = normal > 0x7c00 ? Wide{} + 0x7c00 : normal;
    // Below the smallest normal number, adding 0.5 aligns the mantissa with half precision's and rounds it.
    const Wide subnormal = bits_as<Wide>(bits_as<V>(magnitude) + 0.5f) - 0x3f000000;
    Wide half = magnitude < 113u << 23 ? subnormal : normal;
    half = magnitude > 0x7f800000 ? Wide{} + 0x7e00 : half;
    const Narrow out = __builtin_convertvector(half | ((bits >> 16) & 0x8000), Narrow);
    __builtin_memcpy(p, &out, sizeof(out));
  }
};

template <class V, class T>
DFLASH_INLINE V load(const T* p) {
  return Memory<V, T>::load(p);
}
template <class T, class V>
DFLASH_INLINE void store(T* p, V v) {
  Memory<V, T>::store(p, v);
}

// Keeps a vector that has several uses in a register. Otherwise the compiler may load it again for each of them.
template <class V>
DFLASH_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Calls f(vector type, index) over [0, count), for full vectors and then for single elements.
template <class Real, class F>
DFLASH_INLINE void for_each_lanes(int64_t count, F&& f) {
  constexpr int kLanes = kVectorBytes / sizeof(Real);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(Vector<Real, kLanes>{}, i);
  for (; i < count; ++i) f(Vector<Real, 1>{}, i);
}

// The result of a comparison of two vectors: -1 in the lanes where it holds, otherwise 0.
template <class V>
using MaskOf = decltype(V{} > V{});

// Writes the kept lanes of v one after another, and returns their number. It may overwrite a whole vector from `out`
// on.
template <class V, class Real>
DFLASH_INLINE int compact(Real* out, V v, MaskOf<V> keep) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    if constexpr (sizeof(Real) == 4) {
      const __mmask16 lanes = _mm512_movepi32_mask(bits_as<__m512i>(keep));
      _mm512_storeu_ps(out, _mm512_maskz_compress_ps(lanes, v));
      return __builtin_popcount(lanes);
    } else {
      const __mmask8 lanes = _mm512_movepi64_mask(bits_as<__m512i>(keep));
      _mm512_storeu_pd(out, _mm512_maskz_compress_pd(lanes, v));
      return __builtin_popcount(lanes);
    }
  }
#endif
  int count = 0;
  for (int lane = 0; lane < lanes_of<V>; ++lane) {
    out[count] = v[lane];
    count -= keep[lane];
  }
  return count;
}

// ------------------------------------------------------------------ arithmetic

DFLASH_INLINE float exp_of(float x) { return __builtin_expf(x); }
DFLASH_INLINE double exp_of(double x) { return __builtin_exp(x); }
DFLASH_INLINE float log_of(float x) { return __builtin_logf(x); }
DFLASH_INLINE double log_of(double x) { return __builtin_log(x); }

// e^x = 2^n e^r with |r| <= ln(2)/2; e^r by its Taylor polynomial (relative error below 1e-7 there). Results below
// the smallest normal number are 0, above the largest infinity; NaN stays NaN.
template <int kLanes>
DFLASH_INLINE auto exp_lanes(Vector<float, kLanes> x) {
  using V = Vector<float, kLanes>;
  using I = Vector<int32_t, kLanes>;
  constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  V bounded = x > 88.7f ? V{} + 88.7f : x;
  bounded = bounded < -87.3f ? V{} - 87.3f : bounded;
  const V shifted = bounded * 0x1.715476p0f + kRound;
  const V n = shifted - kRound;
  const V r = (bounded - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  V poly = r * (1.0f / 5040) + 1.0f / 720;
  poly = poly * r + 1.0f / 120;
  poly = poly * r + 1.0f / 24;
  poly = poly * r + 1.0f / 6;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  // n lies in the low bits of `shifted`. Two steps, because 2^128 is no float.
  const I exponent = bits_as<I>(shifted) - bits_as<I>(V{} + kRound);
  const I half = exponent >> 1;
  V result = poly * bits_as<V>((half + 127) << 23) * bits_as<V>((exponent - half + 127) << 23);
  result = x < -87.3f ? V{} : result;
  return x > 88.7f ? V{} + kInfinity : result;
}

template <int kLanes>
DFLASH_INLINE auto exp_lanes(Vector<double, kLanes> x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class V>
DFLASH_INLINE V exp_of(V x) {
  return exp_lanes<lanes_of<V>>(x);
}

// Reduces by pairing lane i of the lower half with lane i of the upper half, in log2(lanes) steps.
template <class V, class Combine>
DFLASH_INLINE auto reduce_lanes(V v, Combine&& combine) {
  if constexpr (lanes_of<V> == 1) {
    return v[0];
  } else {
    using Half = Vector<__typeof__(v[0] + v[0]), lanes_of<V> / 2>;
    Half halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    return reduce_lanes(combine(halves[0], halves[1]), combine);
  }
}

template <class V>
DFLASH_INLINE auto sum_lanes(V v) {
  return reduce_lanes(v, [](auto a, auto b) DFLASH_LAMBDA { return a + b; });
}

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct LanesUpTo : LanesUpTo<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesUpTo<0, kLane...> {
  using type = LaneList<kLane...>;
};

// Adds each even block of kBlock lanes of a, and then of b, to the odd block behind it.
template <int kBlock, class V, int... kLane>
DFLASH_INLINE V add_blocks(V a, V b, LaneList<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / kBlock * 2 * kBlock + kLane % kBlock)...) +
         __builtin_shufflevector(a, b, (kLane / kBlock * 2 * kBlock + kLane % kBlock + kBlock)...);
}

// sums[i] = sum_lanes(v[i]), to the bit, for a power of two of vectors; kBlock is half a vector's lanes. Every step
// merges two vectors into one, so that all sums together take fewer steps than one by one.
template <int kCount, int kBlock, class Real, class V>
DFLASH_INLINE void sum_lanes_of(Real* sums, const V* v) {
  using All = typename LanesUpTo<lanes_of<V>>::type;
  constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
  V merged[kLeft];
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) merged[i] = add_blocks<kBlock>(v[2 * i], v[kCount > 1 ? 2 * i + 1 : 0], All{});
  if constexpr (kBlock > 1) {
    sum_lanes_of<kLeft, kBlock / 2>(sums, merged);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) store(sums + i * lanes_of<V>, merged[i]);
  }
}

template <class V>
DFLASH_INLINE auto max_lanes(V v) {
  return reduce_lanes(v, [](auto a, auto b) DFLASH_LAMBDA { return a > b ? a : b; });
}

}  // namespace dflash::DFLASH_ISA
