// Logits in memory and in registers on a GPU, what lanes do with them, and masses (unnormalised probabilities).
#pragma once

#include "sample/penalties.h"

namespace dflash::DFLASH_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

DFLASH_INLINE int lane_id() { return threadIdx.x % 32; }
DFLASH_INLINE int warp_id() { return threadIdx.x / 32; }

// ex2.approx.ftz: 2^x. Results below the smallest normal number are 0.
DFLASH_INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh.approx: its relative error is up to 2^-11.
DFLASH_INLINE float tanh_of(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// min.NaN: NaN if one of them is NaN.
DFLASH_INLINE float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

template <class Number>
DFLASH_INLINE Number warp_sum(Number x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

// Returns the sum over this lane and those before it.
template <class Number>
DFLASH_INLINE Number warp_scan(Number x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number before = __shfl_up_sync(~0u, x, step);
    if (lane_id() >= step) x += before;
  }
  return x;
}

// The two largest logits.
struct Best {
  float first, second;

  DFLASH_INLINE static Best none() { return {-kInfinity, -kInfinity}; }
  DFLASH_INLINE void merge(const Best& other) {
    second = fmaxf(fmaxf(second, other.second), fminf(first, other.first));
    first = fmaxf(first, other.first);
  }
  DFLASH_INLINE void merge_warp() {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) merge(shuffle_xor(*this, mask));
  }
  // NaN is neither.
  DFLASH_INLINE void add(float x) {
    second = fmaxf(min_nan(first, x), second);
    first = fmaxf(x, first);
  }
};

DFLASH_INLINE __nv_bfloat162 both(__nv_bfloat16 x) { return __bfloat162bfloat162(x); }
DFLASH_INLINE __half2 both(__half x) { return __half2half2(x); }

// The same of chunks of logits; those of 16 bits are taken two at a time.
template <class Values>
struct BestOfChunks {
  Best value = Best::none();

  DFLASH_INLINE void add(const Values& chunk) {
#pragma unroll
    for (int k = 0; k < Values::kSize; ++k) value.add(chunk.values[k]);
  }
  DFLASH_INLINE Best best() const { return value; }
};

template <class T>
  requires(sizeof(T) == 2)
struct BestOfChunks<Chunk<T>> {
  using Pair = decltype(both(T{}));
  Pair first = both(from_float<T>(-kInfinity)), second = first;

  DFLASH_INLINE void add(const Chunk<T>& chunk) {
    const Pair* pairs = reinterpret_cast<const Pair*>(chunk.values);
#pragma unroll
    for (int k = 0; k < Chunk<T>::kSize / 2; ++k) {
      second = __hmax2(__hmin2_nan(first, pairs[k]), second);
      first = __hmax2(pairs[k], first);
    }
  }
  DFLASH_INLINE Best best() const {
    Best best{to_float(first.x), to_float(second.x)};
    best.merge({to_float(first.y), to_float(second.y)});
    return best;
  }
};

// Returns the largest logit of a chunk. NaN is none, unless all are NaN.
template <class Values>
DFLASH_INLINE float largest_of(const Values& chunk) {
  float largest = chunk.values[0];
#pragma unroll
  for (int k = 1; k < Values::kSize; ++k) largest = fmaxf(largest, chunk.values[k]);
  return largest;
}
template <class T>
  requires(sizeof(T) == 2)
DFLASH_INLINE float largest_of(const Chunk<T>& chunk) {
  const auto* const pairs = reinterpret_cast<const decltype(both(T{}))*>(chunk.values);
  auto largest = pairs[0];
#pragma unroll
  for (int k = 1; k < Chunk<T>::kSize / 2; ++k) largest = __hmax2(largest, pairs[k]);
  return fmaxf(to_float(largest.x), to_float(largest.y));
}

// Loads the logits of tokens [i, i + kSize); past the end they are -inf.
template <class T>
DFLASH_INLINE Chunk<T> load_chunk(const T* x, uint32_t vocab, uint32_t i, bool aligned) {
  constexpr int kSize = Chunk<T>::kSize;
  if (aligned && i + kSize <= vocab) return *reinterpret_cast<const Chunk<T>*>(x + i);
  Chunk<T> chunk;
#pragma unroll
  for (int k = 0; k < kSize; ++k) chunk.values[k] = i + k < vocab ? x[i + k] : from_float<T>(-kInfinity);
  return chunk;
}

// A row of logits as they lie in memory. `Values` are the logits of a chunk of neighbouring tokens.
template <class T>
struct PlainLogits {
  using Raw = PlainLogits;  // the same row without penalties
  using Values = Chunk<T>;
  static constexpr int kSize = Chunk<T>::kSize;
  static constexpr bool kIsPlain = true;
  static constexpr bool kIsRaw = true;  // `Values` are as they lie in memory

  const T* x;
  uint32_t vocab;
  bool is_aligned;

  DFLASH_INLINE PlainLogits(const void* logits, DType, int64_t offset, int64_t vocab)
      : x(static_cast<const T*>(logits) + offset), vocab(vocab), is_aligned(device::is_aligned(x)) {}

  DFLASH_INLINE float operator[](int64_t token) const { return to_float(x[token]); }
  DFLASH_INLINE const void* address(uint32_t i) const { return x + i; }
  // Returns the logits of tokens [i, i + kSize), which are -inf past the end of the row.
  DFLASH_INLINE Values at(uint32_t i) const { return load_chunk(x, vocab, i, is_aligned); }
  DFLASH_INLINE PlainLogits within(uint32_t, uint32_t) const { return *this; }
  // Whether the chunks of tokens [begin, end) may be loaded at once.
  DFLASH_INLINE bool is_whole(uint32_t end) const { return is_aligned && end <= vocab; }
  DFLASH_INLINE Values load_whole(uint32_t i) const { return *reinterpret_cast<const Values*>(x + i); }
  DFLASH_INLINE const PlainLogits& in_memory() const { return *this; }
};

template <int kCount>
struct alignas(16) FloatValues {
  static constexpr int kSize = kCount;
  float values[kSize];
};

// A row under a soft cap: softcap * unit(x), unit(x) = tanh(x / softcap).
template <class T>
struct CappedLogits {
  using Raw = PlainLogits<T>;
  static constexpr int kSize = Raw::kSize;
  using Values = FloatValues<kSize>;
  static constexpr bool kIsPlain = true;
  static constexpr bool kIsRaw = false;

  Raw raw;
  uint32_t vocab;
  float softcap, inner;

  DFLASH_INLINE CappedLogits(const Raw& raw, float softcap)
      : raw(raw), vocab(raw.vocab), softcap(softcap), inner((kIsCoarse ? 1 : 2 * kLog2E) / softcap) {}

  DFLASH_INLINE float operator[](int64_t token) const { return softcap * unit(raw[token]); }
  DFLASH_INLINE Values at(uint32_t i) const {
    Values own;
#pragma unroll
    for (int k = 0; k < kSize; ++k) own.values[k] = i + k < vocab ? (*this)[i + k] : -kInfinity;
    return own;
  }
  DFLASH_INLINE CappedLogits within(uint32_t, uint32_t) const { return *this; }
  DFLASH_INLINE bool is_whole(uint32_t end) const { return raw.is_whole(end); }
  DFLASH_INLINE const Raw& in_memory() const { return raw; }

  // NaN for NaN.
  DFLASH_INLINE float unit(float x) const {
    if constexpr (kIsCoarse) return tanh_of(x * inner);
    return 1 - __fdividef(2.f, exp2_of(x * inner) + 1);
  }

 private:
  static constexpr bool kIsCoarse = std::is_same_v<T, __nv_bfloat16>;  // rounding such logits errs by more than tanh_of
};

// A row as it lies in memory, of a dtype that is known only at run time. It serves rows with penalties, for which one
// instance of a kernel is enough.
struct AnyLogits {
  static constexpr int kSize = 8;
  using Raw = AnyLogits;
  using Values = FloatValues<kSize>;
  static constexpr bool kIsRaw = false;

  const char* x;
  DType dtype;
  uint32_t vocab;
  bool is_aligned;

  DFLASH_INLINE AnyLogits(const void* logits, DType dtype, int64_t offset, int64_t vocab)
      : x(static_cast<const char*>(logits) + offset * size_of(dtype)), dtype(dtype), vocab(vocab),
        is_aligned(device::is_aligned(x)) {}

  DFLASH_INLINE float operator[](int64_t token) const {
    return dtype == DType::kFloat32    ? of<float>()[token]
           : dtype == DType::kBFloat16 ? to_float(of<__nv_bfloat16>()[token])
                                       : to_float(of<__half>()[token]);
  }
  DFLASH_INLINE const void* address(uint32_t i) const { return x + int64_t(i) * size_of(dtype); }
  DFLASH_INLINE Values at(uint32_t i) const {
    Values own;
    if (dtype == DType::kFloat32) {
      load_values<float>(own.values, i);
    } else if (dtype == DType::kBFloat16) {
      load_values<__nv_bfloat16>(own.values, i);
    } else {
      load_values<__half>(own.values, i);
    }
    return own;
  }
  DFLASH_INLINE bool is_whole(uint32_t) const { return false; }
  DFLASH_INLINE Values load_whole(uint32_t i) const { return at(i); }

 private:
  DFLASH_INLINE static int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
  template <class T>
  DFLASH_INLINE const T* of() const {
    return reinterpret_cast<const T*>(x);
  }
  template <class T>
  DFLASH_INLINE void load_values(float (&out)[kSize], uint32_t i) const {
    constexpr int kPart = Chunk<T>::kSize;
#pragma unroll
    for (int k = 0; k < kSize; k += kPart) {
      const Chunk<T> chunk = load_chunk(of<T>(), vocab, i + k, is_aligned);
#pragma unroll
      for (int n = 0; n < kPart; ++n) out[k + n] = to_float(chunk.values[n]);
    }
  }
};

// A row of logits after its bias and its penalties.
struct PenalisedLogits {
  static constexpr int kSize = AnyLogits::kSize;
  using Raw = AnyLogits;
  using Values = AnyLogits::Values;
  static constexpr bool kIsPlain = false;

  AnyLogits raw;
  uint32_t vocab;
  bool is_aligned;
  int drafted;                        // 0 in parts of the row that have no drafts
  const Penalties<float>& penalties;  // in shared memory

  DFLASH_INLINE PenalisedLogits(const AnyLogits& raw, const Penalties<float>& penalties)
      : raw(raw), vocab(raw.vocab),
        is_aligned(device::is_aligned(penalties.counts) && device::is_aligned(penalties.bias)),
        drafted(penalties.drafted), penalties(penalties) {}

  DFLASH_INLINE float operator[](int64_t token) const { return penalties(raw[token], token); }
  DFLASH_INLINE const void* address(uint32_t i) const { return raw.address(i); }
  DFLASH_INLINE Values at(uint32_t i) const {
    const Values plain = raw.at(i);
    Values own;
    load_table(own.values, penalties.bias, i);
#pragma unroll
    for (int k = 0; k < kSize; ++k) own.values[k] += plain.values[k];
    if (penalties.counts == nullptr) return own;
    int counts[kSize];
    load_table(counts, penalties.counts, i);
#pragma unroll 1
    for (int j = 0; j < drafted; ++j) {
      const uint32_t place = uint32_t(penalties.drafts[j]) - i;
#pragma unroll
      for (int k = 0; k < kSize; ++k) counts[k] = place == k ? Penalties<float>::one_more(counts[k]) : counts[k];
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) own.values[k] = penalties.with_count(own.values[k], counts[k]);
    return own;
  }
  // Returns the row for tokens of [begin, end) alone. All lanes of a warp call this.
  DFLASH_INLINE PenalisedLogits within(uint32_t begin, uint32_t end) const {
    bool has = false;
#pragma unroll 1
    for (int j = lane_id(); j < drafted; j += 32) {
      has = has || (penalties.drafts[j] >= begin && penalties.drafts[j] < end);
    }
    PenalisedLogits part = *this;
    if (!__any_sync(~0u, has)) part.drafted = 0;
    return part;
  }
  DFLASH_INLINE bool is_whole(uint32_t) const { return false; }
  DFLASH_INLINE Values load_whole(uint32_t i) const { return at(i); }

 private:
  template <class Number>
  DFLASH_INLINE void load_table(Number (&out)[kSize], const Number* table, uint32_t i) const {
    const bool is_whole = is_aligned && i + kSize <= vocab;
#pragma unroll
    for (int k = 0; k < kSize; k += 4) {
      Chunk<Number> own{};
      if (table != nullptr && is_whole) {
        own = *reinterpret_cast<const Chunk<Number>*>(table + i + k);
      } else if (table != nullptr) {
#pragma unroll
        for (int n = 0; n < 4; ++n) own.values[n] = i + k + n < vocab ? table[i + k + n] : Number(0);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) out[k + n] = own.values[n];
    }
  }
};

// Returns the row of logits at an offset, whose penalties count the drafts too. All threads of a block call this, once.
template <class Source>
DFLASH_INLINE Source logits_of(const void* logits, DType dtype, int64_t offset, int64_t vocab,
                               const PenaltyParams& penalties, int64_t row, const int64_t* drafts = nullptr,
                               int64_t drafted = 0) {
  const typename Source::Raw raw(logits, dtype, offset, vocab);
  if constexpr (Source::kIsPlain) {
    return raw;
  } else {
    __shared__ Penalties<float> own;  // it would take a quarter of the registers
    if (threadIdx.x == 0) own = Penalties<float>::of(penalties, row, vocab, drafts, drafted);
    __syncthreads();
    return {raw, own};
  }
}

// The distribution of a row: exp2((x - origin) * rate) * scale for logits x of at least `lowest`, 0 for the others.
struct Masses {
  float lowest, origin, rate, scale;

  // The exponent of a NaN, and of -inf - -inf, is that of -inf, whose mass is 0. 0 * -inf would be NaN.
  DFLASH_INLINE float exponent(float x) const { return fmaxf((x - origin) * rate, -1e4f); }
  DFLASH_INLINE float operator()(float x) const { return (x >= lowest ? exp2_of((x - origin) * rate) : 0.f) * scale; }
  template <class Values>
  DFLASH_INLINE void operator()(float (&mass)[Values::kSize], const Values& x) const {
#pragma unroll
    for (int k = 0; k < Values::kSize; ++k) mass[k] = (*this)(to_float(x.values[k]));
  }
  // Every kind of masses has this: it returns the function that computes the masses of a chunk of a batch (row_gpu.h).
  template <class Batch>
  DFLASH_INLINE auto of(const Batch&) const {
    using Values = typename Batch::Values;
    return [mass = *this](float(&own)[Values::kSize], int, uint32_t, const Values& x) { mass(own, x); };
  }
};

}  // namespace dflash::DFLASH_ISA
