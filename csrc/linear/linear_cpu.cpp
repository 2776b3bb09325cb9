// Products of a few rows with a large weight on the CPU, at the speed at which memory delivers the weight.
//
// A tile of rows and columns keeps one vector of partial sums for every pair of a row and a column, and walks along the
// inner dimension. Each pair thus has the same sums in the same order whatever the tile, so that a row's bits depend
// neither on the number of rows nor on its place among them, nor on how threads share the columns.
#include "common/rms_norm_cpu.h"
#include "common/simd.h"
#include "linear/params.h"

namespace dflash::DFLASH_ISA {

// The tile's sums and operands fit in the vector registers, of which AVX-512 has 32 and the others 16.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 4;
constexpr int kTileColumns = 3;
// Rows that share one read of the weight from memory.
constexpr int kRowsAtOnce = 32;
// A chunk of this many bytes of each of a tile's rows fits in the L1 cache, beside the weight's.
constexpr int64_t kChunkBytes = 2560;

// T: the type of x and the result. W: the type of the weight.
template <class T, class W, class Real>
class Linear {
 public:
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  using V = Vector<Real, kLanes>;

  explicit Linear(const LinearParams& p)
      : p_(p),
        steps_((p.inner + kLanes - 1) / kLanes),
        rows_(kRowsAtOnce * steps_ * kLanes),
        partial_(kRowsAtOnce * kLinearPanel * kLanes),
        sums_(2 * kRowsAtOnce * kLinearPanel) {}

  void run(int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < p_.rows; row += kRowsAtOnce) {
      const int count = int(p_.rows - row < kRowsAtOnce ? p_.rows - row : kRowsAtOnce);
      for (int i = 0; i < count; ++i) read_row(row + i, i);
      // What a tile computes of the rows beyond the last is never used.
      for (int i = count; i % kTileRows != 0; ++i) {
        for (int64_t step = 0; step < steps_; ++step) store(place(i, step), V{});
      }
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kLinearPanel, left = p_.columns - first;
        const int columns = int(left < kLinearPanel ? left : kLinearPanel);
        multiply(count, first, columns, sums_.data());
        if (p_.gate != Gate::kNone) multiply(count, p_.columns + first, columns, gated_sums());
        for (int i = 0; i < count; ++i) finish(row + i, first, columns, i * kLinearPanel);
      }
    }
  }

 private:
  Real* gated_sums() const { return sums_.data() + kRowsAtOnce * kLinearPanel; }

  // Where a row's vector of a step lies: the vectors of a tile's rows stand side by side.
  DFLASH_MEMBER Real* place(int row, int64_t step) const {
    return rows_.data() + ((row / kTileRows * steps_ + step) * kTileRows + row % kTileRows) * kLanes;
  }

  // A row's vector of a step, with zeros beyond the row's end.
  template <class Element>
  DFLASH_MEMBER V load_step(const Element* row, int64_t step) const {
    const int64_t k = step * kLanes;
    if (k + kLanes <= p_.inner) return load<V>(row + k);
    Element end[kLanes] = {};
    __builtin_memcpy(end, row + k, (p_.inner - k) * sizeof(Element));
    return load<V>(end);
  }

  void read_row(int64_t row, int to) const {
    const T* x = static_cast<const T*>(p_.x) + row * p_.inner;
    const T* norm = static_cast<const T*>(p_.norm);
    const Real scale = norm ? norm_scale<Real>(x, p_.inner, p_.norm_eps) : Real(1), one = p_.norm_plus_one ? 1 : 0;
    for (int64_t step = 0; step < steps_; ++step) {
      const V v = load_step(x, step);
      store(place(to, step), norm ? v * scale * (load_step(norm, step) + one) : v);
    }
  }

  // sums[i * kLinearPanel + j] = row i of the rows read * row (first + j) of the weight
  void multiply(int rows, int64_t first, int columns, Real* sums) const {
    const int64_t in_chunk = rows > 1 ? kChunkBytes / kVectorBytes : steps_;
    const int64_t chunks = (steps_ + in_chunk - 1) / in_chunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = steps_ * chunk / chunks, end = steps_ * (chunk + 1) / chunks;
      for (int row = 0; row < rows; row += kTileRows) {
        const int left = rows - row;
        const Tile tile{first, begin, end, row, left < kTileRows ? left : kTileRows, sums};
        if (left == 1) {
          multiply_rows<1>(tile, columns);
        } else if (left == 2) {
          multiply_rows<2>(tile, columns);
        } else if (left <= 4) {
          multiply_rows<4>(tile, columns);
        } else {
          multiply_rows<kTileRows>(tile, columns);
        }
      }
    }
  }

  struct Tile {
    int64_t first, begin, end;  // the panel's first column; the steps of the chunk
    int row, rows;
    Real* sums;
  };

  template <int kRows>
  __attribute__((noinline)) void multiply_rows(const Tile& tile, int columns) const {
    int j = 0;
    for (; j + kTileColumns <= columns; j += kTileColumns) multiply_tile<kRows, kTileColumns>(tile, j);
    for (; j < columns; ++j) multiply_tile<kRows, 1>(tile, j);
  }

  template <int kRows, int kColumns>
  DFLASH_MEMBER void multiply_tile(const Tile& tile, int column) const {
    const Real* x = place(tile.row, tile.begin);
    const W* w = static_cast<const W*>(p_.weight) + (tile.first + column) * p_.inner;
    Real* partial = partial_.data() + (tile.row * kLinearPanel + column * kTileRows) * kLanes;
    V acc[kRows][kColumns] = {};
    if (tile.begin > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < kRows * kColumns; ++i) acc[i % kRows][i / kRows] = load<V>(partial + i * kLanes);
    }
    const auto add = [&](const V (&b)[kColumns]) DFLASH_LAMBDA {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const V a = in_register(load<V>(x + i * kLanes));
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) acc[i][j] += a * b[j];
      }
      x += kTileRows * kLanes;
    };
    const bool is_whole = tile.end * kLanes <= p_.inner;
    const int64_t whole = is_whole ? tile.end : tile.end - 1;
    for (int64_t step = tile.begin; step < whole; ++step) {
      V b[kColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        b[j] = load<V>(w + j * p_.inner + step * kLanes);
        // The next tile's columns follow these in memory.
        if (tile.row == 0) __builtin_prefetch(w + (kColumns + j) * p_.inner + step * kLanes);
      }
      add(b);
    }
    if (!is_whole) {
      V b[kColumns];
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) b[j] = load_step(w + j * p_.inner, whole);
      add(b);
    }
    if (tile.end < steps_) {
#pragma GCC unroll 32
      for (int i = 0; i < kRows * kColumns; ++i) store(partial + i * kLanes, acc[i % kRows][i / kRows]);
      return;
    }
    Real* sums = tile.sums + tile.row * kLinearPanel + column;
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      V of_rows[kRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) of_rows[i] = acc[i][j];
      Real column_sums[kRows > kLanes ? kRows : kLanes];
      sum_lanes_of<kRows, kLanes / 2>(column_sums, of_rows);
      for (int i = 0; i < tile.rows; ++i) sums[i * kLinearPanel + j] = column_sums[i];
    }
  }

  // Bias, gate and residual of one row's columns, and the store.
  void finish(int64_t row, int64_t first, int columns, int64_t offset) const {
    const Real *sums = sums_.data() + offset, *gated = gated_sums() + offset;
    const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + first : nullptr;
    const int64_t place = row * p_.columns + first;
    const T* residual = p_.residual ? static_cast<const T*>(p_.residual) + place : nullptr;
    T* out = static_cast<T*>(p_.out) + place;
    for_each_lanes<Real>(columns, [&](auto lanes, int64_t j) DFLASH_LAMBDA {
      using X = decltype(lanes);
      X y = load<X>(sums + j);
      if (bias) y += load<X>(bias + j);
      if (p_.gate != Gate::kNone) {
        X up = load<X>(gated + j);
        if (bias) up += load<X>(bias + p_.columns + j);
        y = y * gate_of(y) * up;
      }
      if (residual) y += load<X>(residual + j);
      store(out + j, y);
    });
  }

  // activation(y) / y
  template <class X>
  DFLASH_MEMBER X gate_of(X y) const {
    const Real one = 1;
    if (p_.gate == Gate::kSilu) return one / (one + exp_of(-y));
    // 0.5 * (1 + tanh(u)) = 1 / (1 + e^(-2u))
    const X u = y * Real(0.7978845608028654) * (one + Real(0.044715) * y * y);
    return one / (one + exp_of(Real(-2) * u));
  }

  const LinearParams& p_;
  const int64_t steps_;        // vectors of a row
  const Array<Real> rows_;     // the rows in Real, normalised, see place()
  const Array<Real> partial_;  // a panel's sums between two chunks
  const Array<Real> sums_;     // [2, kRowsAtOnce, kLinearPanel]: the products, and those behind the gate
};

// The kernel runs over panels of kLinearPanel columns.
void linear(const LinearParams& params, int64_t begin, int64_t end) {
  if (params.weight_dtype != params.dtype) return Linear<float, bfloat16, float>(params).run(begin, end);
  with_types(params.dtype, [&](auto element, auto real) {
    Linear<decltype(element), decltype(element), decltype(real)>(params).run(begin, end);
  });
}

}  // namespace dflash::DFLASH_ISA
