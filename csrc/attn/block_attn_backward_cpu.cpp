// block_attn's backward on the CPU. The scores of a tile are computed again, with the forward's LSE (FlashAttention,
// arXiv 2205.14135), and transposed as in the forward. With P the probabilities and dP = dO V^T,
//   dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE,   dQ = dS K,   dK = dS^T Q,   dV = P^T dO.
// There is one pass: a thread takes a share of a key head's rows, completes their dQ, and sums their part of dK and dV.
#include "attn/cpu/scores.h"
#include "attn/cpu/tile.h"

namespace dflash::DFLASH_ISA {

template <class T, class Real>
struct Backward {
  using B = Block<Real>;
  using X = typename B::X;
  using Rows = RowTile<B>;
  static constexpr int kHeight = B::kHeight, kVectors = B::kVectors, kLanes = B::kLanes, kWidth = B::kWidth;

  const AttentionBackwardParams& p;
  const int64_t dim, width;  // width: dim, padded to whole register blocks
  const Scoring<Real> scoring;
  KeyTile<T, Real> keys;
  Real *q, *grad_out;                  // [kRowTile, width]
  Real *q_lanes, *grad_out_lanes;      // [panels, dim, kWidth]: the same, with a row in a lane
  Real* grad_q;                        // [panels, dim, kWidth]
  Real *probs, *grad_scores;           // [kKeyTile, kWidth]: of one panel
  Real *lse, *delta;                   // [kRowTile]
  Real *grad_k, *grad_v;               // [padded(kv_len), width]: of the current item

  Backward(const AttentionBackwardParams& p, Scratch scratch)
      : p(p),
        dim(p.head_dim),
        width(padded(dim)),
        scoring{Real(p.scale), Real(p.softcap)},
        keys(p, scratch),
        q(scratch.take<Real>(kRowTile * width)),
        grad_out(scratch.take<Real>(kRowTile * width)),
        q_lanes(scratch.take<Real>(kRowTile * dim)),
        grad_out_lanes(scratch.take<Real>(kRowTile * dim)),
        grad_q(scratch.take<Real>(kRowTile * dim)),
        probs(scratch.take<Real>(kKeyTile * kWidth)),
        grad_scores(scratch.take<Real>(kKeyTile * kWidth)),
        lse(scratch.take<Real>(kRowTile)),
        delta(scratch.take<Real>(kRowTile)) {
    __builtin_memset(q, 0, kRowTile * width * sizeof(Real));
    __builtin_memset(grad_out, 0, kRowTile * width * sizeof(Real));
  }

  // An item is a key head and a split. A split takes every splits-th tile of rows, because under a causal mask later
  // tiles cost more.
  void run(int64_t item) {
    const int64_t split = item % p.splits, head = item / p.splits;
    const int64_t size = padded(p.kv_len) * width;
    grad_k = static_cast<Real*>(p.partial) + (split * p.batch * p.kv_heads + head) * 2 * size;
    grad_v = grad_k + size;
    if (size > 0) __builtin_memset(grad_k, 0, 2 * size * sizeof(Real));
    for (int64_t t = split; t < row_tiles_of(p); t += p.splits) {
      const Rows rows(p, head / p.kv_heads, head % p.kv_heads, t * kRowTile, {0, p.kv_len});
      begin(rows);
      for (int64_t key = rows.keys.begin / kKeyTile * kKeyTile; key < rows.keys.end; key += kKeyTile) {
        const Range tile{key, key + kKeyTile};
        if (!keys.load(rows, tile)) continue;
        rows.each_panel(tile, [&](int64_t i, Range part) { attend(rows.panels[i], i, tile, part); });
      }
      finish(rows);
    }
  }

  // Rows that see nothing, and lanes after the last row, count as zeros, whatever their memory holds.
  void begin(const Rows& rows) {
    const int64_t lanes = rows.panel_count() * kWidth;
    __builtin_memset(grad_q, 0, lanes * dim * sizeof(Real));
    for (int64_t r = 0; r < lanes; ++r) {
      const int64_t b = rows.b, head = rows.head(r), i = rows.position(r);
      const int64_t at = (b * p.heads + head) * p.q_len + i;
      Real* const to[] = {q + r * width, grad_out + r * width};
      if (r >= rows.count || rows.sight(r).empty()) {
        for (Real* x : to) __builtin_memset(x, 0, dim * sizeof(Real));
        lse[r] = delta[r] = 0;
      } else {
        copy_row(to[0], row_of(static_cast<const T*>(p.q), p.q_strides, b, head, i), dim);
        copy_row(to[1], row_of(static_cast<const T*>(p.grad_out), p.grad_out_strides, b, head, i), dim);
        lse[r] = static_cast<const Real*>(p.lse)[at];
        delta[r] = dot(to[1], row_of(static_cast<const T*>(p.out), p.out_strides, b, head, i));
        if (p.grad_lse) delta[r] -= static_cast<const Real*>(p.grad_lse)[at];
      }
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t lane = (r / kWidth * dim + d) * kWidth + r % kWidth;
        q_lanes[lane] = to[0][d];
        grad_out_lanes[lane] = to[1][d];
      }
    }
  }

  Real dot(const Real* a, const T* b) const {
    using V = Vector<Real, 8>;
    V sum{};
    for (int64_t d = 0; d < dim; d += 8) sum += load<V>(a + d) * load<V>(b + d);
    return sum_lanes(sum);
  }

  template <bool kMasked>
  DFLASH_MEMBER void keep_probs(B& block, const Panel<B>& panel, int64_t i, int64_t j, int64_t key) const {
    B::each([&](int m, int n) DFLASH_LAMBDA {
      const X score = scoring(block.at[m][n]);
      const X seen = kMasked ? (panel.sees(n, key + m) ? score : X{} - kInfinity) : score;
      const X prob = weight_of(seen - load<X>(lse + i * kWidth + n * kLanes));
      const int64_t at = (j + m) * kWidth + n * kLanes;
      store(probs + at, prob);
      if (scoring.cap != 0) store(grad_scores + at, prob * scoring.slope(score));
    });
  }

  void attend(const Panel<B>& panel, int64_t i, Range tile, Range part) {
    const int64_t first = part.begin - tile.begin, last = part.end - tile.begin;
    const Real* const sloped = scoring.cap == 0 ? probs : grad_scores;
    for (int64_t j = first; j < last; j += kHeight) {
      B block;
      block.multiply(keys.k + j * dim, dim, 1, q_lanes + i * dim * kWidth, kWidth, dim);
      const int64_t key = tile.begin + j;
      panel.all_see({key, key + kHeight}) ? keep_probs<false>(block, panel, i, j, key)
                                          : keep_probs<true>(block, panel, i, j, key);
      block.multiply(keys.v + j * dim, dim, 1, grad_out_lanes + i * dim * kWidth, kWidth, dim);
      B::each([&](int m, int n) DFLASH_LAMBDA {
        const int64_t at = (j + m) * kWidth + n * kLanes;
        const X difference = block.at[m][n] - load<X>(delta + i * kWidth + n * kLanes);
        store(grad_scores + at, load<X>(sloped + at) * difference);
      });
    }
    for (int64_t j = first; j < last; j += kHeight) {
      add_rows(grad_v + (tile.begin + j) * width, probs + j * kWidth, grad_out + i * kWidth * width);
      add_rows(grad_k + (tile.begin + j) * width, grad_scores + j * kWidth, q + i * kWidth * width);
    }
    for (int64_t d = 0; d < dim; d += kHeight) {
      B block;
      block.multiply(keys.k + first * dim + d, 1, dim, grad_scores + first * kWidth, kWidth, last - first);
      block.add_to(grad_q + (i * dim + d) * kWidth, kWidth);
    }
  }

  // Adds the weighted rows of a panel to kHeight keys. weights is [kHeight, kWidth], rows [kWidth, width].
  DFLASH_MEMBER void add_rows(Real* to, const Real* weights, const Real* rows) const {
    for (int64_t d = 0; d < dim; d += kWidth) {
      B block;
      block.multiply(weights, kWidth, 1, rows + d, width, kWidth);
      block.add_to(to + d, width);
    }
  }

  void finish(const Rows& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      T* to = row_of(static_cast<T*>(p.grad_q), p.grad_q_strides, rows.b, rows.head(r), rows.position(r));
      const Real* from = grad_q + r / kWidth * dim * kWidth + r % kWidth;
      for (int64_t d = 0; d < dim; ++d) store(to + d, Vector<Real, 1>{from[d * kWidth] * scoring.scale});
    }
  }
};

// Adds up the splits' gradients of one key, in the order of the splits.
template <class T, class Real>
static void reduce_key(const AttentionBackwardParams& p, int64_t index) {
  using V = Vector<Real, 8>;
  const int64_t key = index % p.kv_len, head = index / p.kv_len;
  const int64_t width = padded(p.head_dim), size = padded(p.kv_len) * width;
  const Real* k = static_cast<const Real*>(p.partial) + head * 2 * size + key * width;
  T* to_k = row_of(static_cast<T*>(p.grad_k), p.grad_k_strides, head / p.kv_heads, head % p.kv_heads, key);
  T* to_v = row_of(static_cast<T*>(p.grad_v), p.grad_v_strides, head / p.kv_heads, head % p.kv_heads, key);
  for (int64_t d = 0; d < p.head_dim; d += 8) {
    V sum_k{}, sum_v{};
    for (int64_t s = 0; s < p.splits; ++s) {
      const Real* from = k + s * p.batch * p.kv_heads * 2 * size + d;
      sum_k += load<V>(from);
      sum_v += load<V>(from + size);
    }
    store(to_k + d, sum_k * Real(p.scale));
    store(to_v + d, sum_v);
  }
}

template <class T, class Real>
static void run_backward(const AttentionBackwardParams& p, int64_t thread) {
  Backward<T, Real> backward(p, {static_cast<char*>(p.scratch) + thread * backward_scratch(p.head_dim) * sizeof(Real)});
  take_items(p, p.batch * p.kv_heads * p.splits, [&](int64_t item) { backward.run(item); });
}

void block_attn_backward(const AttentionBackwardParams& p, int64_t thread, int64_t) {
  switch (p.dtype) {
    case DType::kFloat32: return run_backward<float, float>(p, thread);
    case DType::kFloat64: return run_backward<double, double>(p, thread);
    case DType::kBFloat16: return run_backward<bfloat16, float>(p, thread);
    case DType::kFloat16: return run_backward<float16, float>(p, thread);
  }
}

void block_attn_backward_keys(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end; ++key) {
    switch (p.dtype) {
      case DType::kFloat32: reduce_key<float, float>(p, key); break;
      case DType::kFloat64: reduce_key<double, double>(p, key); break;
      case DType::kBFloat16: reduce_key<bfloat16, float>(p, key); break;
      case DType::kFloat16: reduce_key<float16, float>(p, key); break;
    }
  }
}

}  // namespace dflash::DFLASH_ISA
