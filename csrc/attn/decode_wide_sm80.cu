// What stands before and after the forward where it decodes (attn/decode_wide.h): one launch that splits every row's
// keys, copies the queries twice and gathers keys and values from the cache, and one that adds the two halves.
#include "attn/decode_wide.h"
#include "attn/masking.h"
#include "common/dispatch.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kUnit = 32;  // keys, or rows of queries, that a block copies

// Eight numbers of 16 bits.
template <class T>
DFLASH_INLINE uint4 read_chunk(const void* data, int64_t at) {
  const T* from = static_cast<const T*>(data) + at;
  if (is_aligned(from)) return *reinterpret_cast<const uint4*>(from);
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < 8; ++i) chunk.values[i] = from[i];
  return *reinterpret_cast<const uint4*>(&chunk);
}

template <class T>
DFLASH_INLINE void write_chunk(void* data, int64_t at, const uint4& words) {
  T* to = static_cast<T*>(data) + at;
  if (is_aligned(to)) {
    *reinterpret_cast<uint4*>(to) = words;
    return;
  }
  const T* values = reinterpret_cast<const T*>(&words);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = values[i];
}

// The bits of the keys first ... first + 31 that lie in [begin, begin + length).
DFLASH_INLINE unsigned bits_of(int begin, unsigned length, int first) {
  const int low = max(begin, first) - first, high = min(begin + static_cast<int>(length), first + kUnit) - first;
  return low < high ? ~0u >> (kUnit - (high - low)) << low : 0u;
}

// Which of the 32 keys from `first` on some row of an entry sees. All threads of the block call it, once.
DFLASH_INLINE unsigned seen_keys(const AttentionParams& p, int batch, int first) {
  __shared__ unsigned seen;
  if (threadIdx.x == 0) seen = 0;
  __syncthreads();
  unsigned bits = 0;
  for (int row = threadIdx.x; row < p.q_len; row += kThreads) {
    const RowBounds bounds(p.mask, batch, row, static_cast<int>(p.kv_len));
    bits |= bits_of(bounds.ctx_lo, bounds.ctx_len, first) | bits_of(bounds.blk_lo, bounds.blk_len, first);
  }
  bits = __reduce_or_sync(~0u, bits);
  if (threadIdx.x % 32 == 0) atomicOr(&seen, bits);
  __syncthreads();
  return seen;
}

// Copies 32 keys and values of a head.
template <class T>
DFLASH_INLINE void gather_keys(const WideDecodeParams& p, int64_t unit) {
  const int64_t units = (p.kv_len + kUnit - 1) / kUnit, of_head = unit / units;
  const int first = static_cast<int>(unit % units) * kUnit, head = static_cast<int>(of_head % p.kv_heads);
  const int batch = static_cast<int>(of_head / p.kv_heads);
  const unsigned seen = seen_keys(p, batch, first);
  const int chunks = static_cast<int>(p.head_dim / 8), count = min(kUnit, static_cast<int>(p.kv_len) - first);
#pragma unroll 4
  for (int i = threadIdx.x; i < count * chunks; i += kThreads) {
    const int key = i / chunks, column = i % chunks * 8;
    const int64_t to = ((of_head * p.kv_len) + first + key) * p.head_dim + column;
    uint4 k{}, v{};
    if (seen >> key & 1) {
      int64_t outer = batch, row = first + key;
      if (p.pages.table != nullptr) {
        const unsigned size = static_cast<unsigned>(p.pages.page_size), at = static_cast<unsigned>(row);
        outer = p.pages.table[batch * p.pages.max_pages + at / size];
        row = at % size;
      }
      // An entry that is no page is a page of zeros.
      if (p.pages.table == nullptr || (0 <= outer && outer < p.pages.count)) {
        const auto& [k_batch, k_head, k_row] = p.k_strides;
        const auto& [v_batch, v_head, v_row] = p.v_strides;
        k = read_chunk<T>(p.k, outer * k_batch + head * k_head + row * k_row + column);
        v = read_chunk<T>(p.v, outer * v_batch + head * v_head + row * v_row + column);
      }
      write_chunk<T>(p.keys, to, k);
    }
    write_chunk<T>(p.values, to, v);
  }
}

// Copies 32 rows of queries of a head twice. The blocks of the first head also write their bounds.
template <class T>
DFLASH_INLINE void split_rows(const WideDecodeParams& p, int64_t unit) {
  const int64_t units = (p.q_len + kUnit - 1) / kUnit, of_head = unit / units;
  const int64_t first = unit % units * kUnit, head = of_head % p.heads, batch = of_head / p.heads;
  const int chunks = static_cast<int>(p.head_dim / 8);
  const int count = static_cast<int>(min(int64_t(kUnit), p.q_len - first));
#pragma unroll 4
  for (int i = threadIdx.x; i < count * chunks; i += kThreads) {
    const int64_t row = first + i / chunks, column = i % chunks * 8;
    const auto& [of_batch, of_q_head, of_row] = p.q_strides;
    const uint4 q = read_chunk<T>(p.q, batch * of_batch + head * of_q_head + row * of_row + column);
    for (int half = 0; half < 2; ++half) {
      write_chunk<T>(p.both_q, ((2 * of_head + half) * p.q_len + row) * p.head_dim + column, q);
    }
  }
  if (head > 0 || batch >= p.mask_entries || threadIdx.x >= count) return;
  const int64_t row = first + threadIdx.x;
  const RowBounds keys(p.mask, batch, row, static_cast<int>(p.kv_len));
  const int ctx_hi = keys.ctx_lo + static_cast<int>(keys.ctx_len), blk_hi = keys.blk_lo + static_cast<int>(keys.blk_len);
  // The halves are equal where the block follows the context.
  const int middle = keys.ctx_lo + static_cast<int>(min(keys.ctx_len, keys.ctx_len / 2 + keys.blk_len / 2));
  const int halves[4][2] = {{keys.ctx_lo, middle},
                            {middle, ctx_hi},
                            {keys.blk_lo, max(keys.blk_lo, middle)},
                            {min(blk_hi, middle), blk_hi}};
  for (int bound = 0; bound < 4; ++bound) {
    for (int half = 0; half < 2; ++half) {
      p.bounds[((bound * p.mask_entries + batch) * 2 + half) * p.q_len + row] = halves[bound][half];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) wide_decode_split_sm80(const WideDecodeParams p, const int64_t key_units) {
  if (blockIdx.x < key_units) {
    gather_keys<T>(p, blockIdx.x);
  } else {
    split_rows<T>(p, blockIdx.x - key_units);
  }
}

// A warp adds the halves of one row: softmax(lse of the halves) weighs them.
template <class T>
__global__ void __launch_bounds__(kThreads) wide_decode_join_sm80(const WideDecodeParams p) {
  const int64_t which = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (which >= p.batch * p.heads * p.q_len) return;
  const int64_t of_head = which / p.q_len, row = which % p.q_len, head = of_head % p.heads, batch = of_head / p.heads;
  const int64_t low = 2 * of_head * p.q_len + row, high = low + p.q_len;
  const float lse[2] = {p.lse[low], p.lse[high]};
  const float share = lse[0] == -kInfinity ? 0.f : 1.f / (1.f + exp_of(lse[1] - lse[0]));
  for (int column = threadIdx.x % 32 * 8; column < p.head_dim; column += 32 * 8) {
    const uint4 halves[2] = {read_chunk<T>(p.both_out, low * p.head_dim + column),
                             read_chunk<T>(p.both_out, high * p.head_dim + column)};
    const auto sum = [&](uint32_t first, uint32_t second) {
      float a[2], b[2];
      unpack<T>(a[0], a[1], first);
      unpack<T>(b[0], b[1], second);
      return pack<T>(share * a[0] + (1.f - share) * b[0], share * a[1] + (1.f - share) * b[1]);
    };
    const uint4 out{sum(halves[0].x, halves[1].x), sum(halves[0].y, halves[1].y), sum(halves[0].z, halves[1].z),
                    sum(halves[0].w, halves[1].w)};
    const auto& [of_batch, of_out_head, of_row] = p.out_strides;
    write_chunk<T>(p.out, batch * of_batch + head * of_out_head + row * of_row + column, out);
  }
}

}  // namespace
}  // namespace device

const char* wide_decode_split(const WideDecodeParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const auto units_of = [](int64_t length) { return (length + device::kUnit - 1) / device::kUnit; };
    const int64_t key_units = p.batch * p.kv_heads * units_of(p.kv_len);
    const LaunchShape shape{.blocks = key_units + p.batch * p.heads * units_of(p.q_len), .threads = device::kThreads};
    return launch_kernel(device::wide_decode_split_sm80<T>, shape, stream, p, key_units);
  });
}

const char* wide_decode_join(const WideDecodeParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const int64_t rows = p.batch * p.heads * p.q_len;
    const LaunchShape shape{.blocks = (rows + device::kWarps - 1) / device::kWarps, .threads = device::kThreads};
    return launch_kernel(device::wide_decode_join_sm80<T>, shape, stream, p);
  });
}

}  // namespace dflash
