// block_attn's forward and decoding on the CPU. Scores are computed transposed, S^T = K Q^T, so that a row is a lane of
// a vector. Maxima, sums and masks work on all lanes at once, and keys and values are read number by number from their
// rows. The softmax is the online one (Milakov and Gimelshein, arXiv 1805.02867), tile by tile as in FlashAttention
// (arXiv 2205.14135).
#include "attn/cpu/scores.h"
#include "attn/cpu/tile.h"

namespace dflash::DFLASH_ISA {

// Divides a row's sums of weight * value by the sum of weights, which is 0 if the row sees no key.
template <class T, class Real>
DFLASH_INLINE void write_row(const AttentionForwardParams& p, const Real* sums, int64_t b, int64_t head, int64_t i,
                             Real max, Real sum) {
  T* to = row_of(static_cast<T*>(p.out), p.out_strides, b, head, i);
  const Real inverse = sum == 0 ? Real(0) : 1 / sum;
  for (int64_t d = 0; d < p.head_dim; d += 8) store(to + d, load<Vector<Real, 8>>(sums + d) * inverse);
  if (!p.lse) return;
  static_cast<Real*>(p.lse)[(b * p.heads + head) * p.q_len + i] = sum == 0 ? Real(-kInfinity) : max + log_of(sum);
}

template <class T, class B>
struct Forward {
  using Real = typename B::Number;
  using X = typename B::X;
  using Rows = RowTile<B>;
  static constexpr int kHeight = B::kHeight, kVectors = B::kVectors, kWidth = B::kWidth;

  const AttentionForwardParams& p;
  const int64_t dim;
  const Scoring<Real> scoring;
  KeyTile<T, Real> keys;
  Real* q;       // [panels, dim, kWidth]
  Real* out;     // [panels, dim, kWidth]: sums of weight * value
  Real* scores;  // [kKeyTile, kWidth]: of one panel, then their weights
  Real* finite;  // [kKeyTile, dim]: the values of a tile with zeros for those that are not finite
  Real* row;     // [dim]
  X max[Rows::kPanels][kVectors], sum[Rows::kPanels][kVectors];

  Forward(const AttentionForwardParams& p, Scratch scratch)
      : p(p),
        dim(p.head_dim),
        scoring{Real(p.scale), Real(p.softcap)},
        keys(p, scratch),
        q(scratch.take<Real>(kRowTile * dim)),
        out(scratch.take<Real>(kRowTile * dim)),
        scores(scratch.take<Real>(kKeyTile * kWidth)),
        finite(scratch.take<Real>(kKeyTile * dim)),
        row(scratch.take<Real>(dim)) {}

  void run(int64_t item) {
    const int64_t split = item % p.splits, rest = item / p.splits;
    const int64_t tile = rest % row_tiles_of(p), head = rest / row_tiles_of(p);
    const Range within = Range{split * p.split_len, (split + 1) * p.split_len}.intersect({0, p.kv_len});
    const Rows rows(p, head / p.kv_heads, head % p.kv_heads, tile * kRowTile, within);
    begin(rows);
    for (int64_t key = rows.keys.begin / kKeyTile * kKeyTile; key < rows.keys.end; key += kKeyTile) {
      const Range tile{key, key + kKeyTile};
      if (!keys.load(rows, tile)) continue;
      rows.each_panel(tile, [&](int64_t i, Range part) { attend(rows.panels[i], i, tile, part); });
    }
    p.splits == 1 ? finish(rows) : finish_part(rows, split);
  }

  void begin(const Rows& rows) {
    for (int64_t i = 0; i < rows.panel_count(); ++i) {
      for (int lane = 0; lane < kWidth; ++lane) {
        const int64_t r = i * kWidth + lane;
        if (rows.sight(r).empty()) {
          __builtin_memset(row, 0, dim * sizeof(Real));
        } else {
          copy_row(row, row_of(static_cast<const T*>(p.q), p.q_strides, rows.b, rows.head(r), rows.position(r)), dim);
        }
        for (int64_t d = 0; d < dim; ++d) q[(i * dim + d) * kWidth + lane] = row[d];
      }
      for (int n = 0; n < kVectors; ++n) {
        max[i][n] = X{} - kInfinity;
        sum[i][n] = X{};
      }
    }
    __builtin_memset(out, 0, rows.panel_count() * dim * kWidth * sizeof(Real));
  }

  template <bool kMasked>
  DFLASH_MEMBER void keep(B& block, const Panel<B>& panel, int64_t key, X (&largest)[kVectors]) const {
    B::each([&](int m, int n) DFLASH_LAMBDA {
      X s = scoring(block.at[m][n]);
      if constexpr (kMasked) s = panel.sees(n, key + m) ? s : X{} - kInfinity;
      largest[n] = s > largest[n] ? s : largest[n];
      block.at[m][n] = s;
    });
  }

  void attend(const Panel<B>& panel, int64_t i, Range tile, Range part) {
    X largest[kVectors];
    for (int n = 0; n < kVectors; ++n) largest[n] = max[i][n];
    const int64_t first = part.begin - tile.begin, last = part.end - tile.begin;
    for (int64_t j = first; j < last; j += kHeight) {
      B block;
      block.multiply(keys.k + j * dim, dim, 1, q + i * dim * kWidth, kWidth, dim);
      const int64_t key = tile.begin + j;
      panel.all_see({key, key + kHeight}) ? keep<false>(block, panel, key, largest)
                                          : keep<true>(block, panel, key, largest);
      block.store_to(scores + j * kWidth, kWidth);
    }

    X shift[kVectors], shrink[kVectors], total[kVectors] = {};
    for (int n = 0; n < kVectors; ++n) {
      shift[n] = finite_or_zero(largest[n]);
      shrink[n] = weight_of(max[i][n] - shift[n]);
      max[i][n] = largest[n];
    }
    for (int64_t j = first; j < last; ++j) {
      for (int n = 0; n < kVectors; ++n) {
        Real* s = scores + j * kWidth + n * B::kLanes;
        const X w = weight_of(load<X>(s) - shift[n]);
        total[n] += w;
        store(s, w);
      }
    }
    for (int n = 0; n < kVectors; ++n) sum[i][n] = sum[i][n] * shrink[n] + total[n];

    // A weight of zero does not hide a value that is not finite, so the product takes zeros for such values.
    const bool is_clean = panel.all_see(part) || are_finite(first, last);
    const Real* const values = is_clean ? keys.v : with_zeros(first, last);
    for (int64_t d = 0; d < dim; d += kHeight) {
      Real* const o = out + (i * dim + d) * kWidth;
      B block;
      block.multiply(values + first * dim + d, 1, dim, scores + first * kWidth, kWidth, last - first);
      B::each([&](int m, int n) DFLASH_LAMBDA {
        block.at[m][n] += load<X>(o + m * kWidth + n * B::kLanes) * shrink[n];
      });
      block.store_to(o, kWidth);
    }
    if (!is_clean) add_not_finite(panel, i, tile.begin, first, last);
  }

  // The values of keys [first, last) of the tile, in whole steps of kHeight.
  DFLASH_MEMBER bool are_finite(int64_t first, int64_t last) const {
    using Eight = Vector<Real, 8>;
    Eight zeros[4] = {};  // four independent sums, so that they do not wait for each other
    for (int64_t d = first * dim; d < last * dim; d += 32) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) zeros[i] += load<Eight>(keys.v + d + 8 * i) * 0;
    }
    const Eight all = zeros[0] + zeros[1] + zeros[2] + zeros[3];
    Real sum = 0;
    for (int lane = 0; lane < 8; ++lane) sum += all[lane];
    return sum == 0;
  }

  // Copies values, with zeros for those that are not finite.
  const Real* with_zeros(int64_t first, int64_t last) {
    for (int64_t d = first * dim; d < last * dim; ++d) finite[d] = keys.v[d] * 0 == 0 ? keys.v[d] : 0;
    return finite;
  }

  // Adds values that are not finite to the rows that see them.
  void add_not_finite(const Panel<B>& panel, int64_t i, int64_t first_key, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      for (int64_t d = 0; d < dim; ++d) {
        const Real value = keys.v[j * dim + d];
        if (value * 0 == 0) continue;
        for (int n = 0; n < kVectors; ++n) {
          Real* const o = out + (i * dim + d) * kWidth + n * B::kLanes;
          store(o, load<X>(o) + (panel.sees(n, first_key + j) ? X{} + value : X{}));
        }
      }
    }
  }

  // Calls f(b, head, position, maximum, sum) for every row, with `row` holding its sums of weight * value.
  template <class F>
  DFLASH_MEMBER void each_row(const Rows& rows, F&& f) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t i = r / kWidth, n = r % kWidth / B::kLanes, lane = r % B::kLanes;
      for (int64_t d = 0; d < dim; ++d) row[d] = out[(i * dim + d) * kWidth + r % kWidth];
      f(rows.b, rows.head(r), rows.position(r), max[i][n][lane], sum[i][n][lane]);
    }
  }

  void finish(const Rows& rows) {
    each_row(rows, [&](int64_t b, int64_t head, int64_t i, Real max, Real sum) {
      write_row<T>(p, row, b, head, i, max, sum);
    });
  }

  void finish_part(const Rows& rows, int64_t split) {
    each_row(rows, [&](int64_t b, int64_t head, int64_t i, Real max, Real sum) {
      const int64_t at = ((split * p.batch + b) * p.heads + head) * p.q_len + i;
      copy_row(static_cast<Real*>(p.partial_out) + at * dim, row, dim);
      static_cast<Real*>(p.partial_stats)[2 * at] = max;
      static_cast<Real*>(p.partial_stats)[2 * at + 1] = sum;
    });
  }
};

// Combines the parts of one row, in the order of the splits.
template <class T, class Real>
static void combine(const AttentionForwardParams& p, int64_t index) {
  const int64_t rows = p.batch * p.heads * p.q_len;
  const Real* stats = static_cast<const Real*>(p.partial_stats) + 2 * index;
  const Real* part = static_cast<const Real*>(p.partial_out) + index * p.head_dim;
  Real max = -kInfinity, sum = 0, sums[kMaxHeadDim] = {};
  for (int64_t s = 0; s < p.splits; ++s) max = stats[2 * s * rows] > max ? stats[2 * s * rows] : max;
  for (int64_t s = 0; s < p.splits; ++s) {
    if (stats[2 * s * rows + 1] == 0) continue;
    const Real weight = exp_of(stats[2 * s * rows] - max);
    sum += weight * stats[2 * s * rows + 1];
    for (int64_t d = 0; d < p.head_dim; ++d) sums[d] += weight * part[s * rows * p.head_dim + d];
  }
  const int64_t i = index % p.q_len, head = index / p.q_len % p.heads, b = index / p.q_len / p.heads;
  write_row<T>(p, sums, b, head, i, max, sum);
}

template <class T, class B>
static void run_blocks(const AttentionForwardParams& p, int64_t thread) {
  const int64_t scratch = thread * forward_scratch(p.head_dim) * sizeof(typename B::Number);
  Forward<T, B> forward(p, {static_cast<char*>(p.scratch) + scratch});
  take_items(p, p.batch * p.kv_heads * row_tiles_of(p) * p.splits, [&](int64_t item) { forward.run(item); });
}

template <class T, class Real>
static void run_forward(const AttentionForwardParams& p, int64_t thread) {
  rows_of(p) <= Block<Real>::kLanes ? run_blocks<T, Block<Real, 1>>(p, thread) : run_blocks<T, Block<Real>>(p, thread);
}

void block_attn(const AttentionForwardParams& p, int64_t thread, int64_t) {
  switch (p.dtype) {
    case DType::kFloat32: return run_forward<float, float>(p, thread);
    case DType::kFloat64: return run_forward<double, double>(p, thread);
    case DType::kBFloat16: return run_forward<bfloat16, float>(p, thread);
    case DType::kFloat16: return run_forward<float16, float>(p, thread);
  }
}

void block_attn_combine(const AttentionForwardParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    switch (p.dtype) {
      case DType::kFloat32: combine<float, float>(p, row); break;
      case DType::kFloat64: combine<double, double>(p, row); break;
      case DType::kBFloat16: combine<bfloat16, float>(p, row); break;
      case DType::kFloat16: combine<float16, float>(p, row); break;
    }
  }
}

}  // namespace dflash::DFLASH_ISA
