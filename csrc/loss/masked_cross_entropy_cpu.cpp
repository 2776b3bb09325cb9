// Masked cross-entropy on the CPU. A row is read in pieces that fit in the L1 cache. A piece is read twice, for its
// maximum and then for its sums, so that memory is read once.
#include "loss/row.h"

namespace dflash::DFLASH_ISA {

// T is the type of the logits in memory, Real that of the arithmetic.
template <class T, class Real>
struct CrossEntropyRow {
  static constexpr int kLanes = kVectorBytes / sizeof(Real);
  static constexpr int64_t kPiece = 1024;
  using Wide = Vector<Real, kLanes>;
  using One = Vector<Real, 1>;
  using Stats = RowStats<Real>;

  const CrossEntropyParams& params;
  const RowLoss<Real> loss;

  // Calls f(vector type, index) over [begin, end), for full vectors and then for single elements.
  template <class F>
  static DFLASH_MEMBER void for_each(int64_t begin, int64_t end, F&& f) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) f(Wide{}, i);
    for (; i < end; ++i) f(One{}, i);
  }

  static DFLASH_MEMBER Real max_of(const T* x, int64_t begin, int64_t end) {
    Wide wide = Wide{} - kInfinity;
    One one = One{} - kInfinity;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Wide v = load<Wide>(x + i);
      wide = v > wide ? v : wide;
    }
    for (; i < end; ++i) {
      const One v = load<One>(x + i);
      one = v > one ? v : one;
    }
    const Real max = max_lanes(wide);
    return one[0] > max ? one[0] : max;
  }

  template <bool kTeacher>
  DFLASH_MEMBER void add_piece(RowSums<Real>& sums, const T* x, const T* y, int64_t begin, int64_t end) const {
    const Real max = finite_or_zero(sums.max), teacher_max = finite_or_zero(sums.teacher_max);
    Sums<Wide> wide;
    Sums<One> one;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Wide teacher = kTeacher ? load<Wide>(y + i) : Wide{};
      wide.template add<kTeacher, true>(loss.softcap(load<Wide>(x + i)), teacher, max, teacher_max);
    }
    for (; i < end; ++i) {
      const One teacher = kTeacher ? load<One>(y + i) : One{};
      one.template add<kTeacher, true>(loss.softcap(load<One>(x + i)), teacher, max, teacher_max);
    }
    sums.e += sum_lanes(wide.e) + one.e[0];
    sums.e_d += sum_lanes(wide.e_d) + one.e_d[0];
    sums.d += sum_lanes(wide.d) + one.d[0];
    sums.u += sum_lanes(wide.u) + one.u[0];
    sums.u_difference += sum_lanes(wide.u_difference) + one.u_difference[0];
    sums.count += Real(end - begin);
  }

  // Adds [begin, end) to the sums and returns its largest logit.
  template <bool kTeacher>
  DFLASH_MEMBER Real add(RowSums<Real>& sums, const T* x, const T* y, int64_t begin, int64_t end) const {
    Real largest = -kInfinity;
    for (int64_t i = begin; i < end; i += kPiece) {
      const int64_t stop = i + kPiece < end ? i + kPiece : end;
      const Real max = max_of(x, i, stop);
      largest = max > largest ? max : largest;
      sums.raise(loss.softcap(max), kTeacher ? max_of(y, i, stop) : -kInfinity);
      add_piece<kTeacher>(sums, x, y, i, stop);
    }
    return largest;
  }

  // Returns the total variation, and adds to stats what its gradient needs. This is a second read of the row, because p
  // and t need their normalisers first.
  DFLASH_MEMBER Real total_variation(Stats& stats, const T* x, const T* y) const {
    Real distance = 0, mean_sign = 0;
    for_each(0, params.vocab, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using X = decltype(lanes);
      const X p = stats.probability(loss.softcap(load<X>(x + i)));
      const X t = stats.teacher_probability(load<X>(y + i));
      const X sign = half_sign(p, t);
      distance += sum_lanes(sign * (p - t));
      mean_sign += sum_lanes(sign * p);
    });
    stats.mean_sign = mean_sign;
    return distance;
  }

  template <bool kTeacher>
  DFLASH_MEMBER Stats forward(int64_t row, const T* x, const T* y) const {
    const int64_t target = params.target[row];
    RowSums<Real> sums;
    // The target is the argmax if it beats everything before it and nothing after it beats it.
    const Real before = add<kTeacher>(sums, x, y, 0, target);
    const Real rest = add<kTeacher>(sums, x, y, target, params.vocab);
    const One logit = load<One>(x + target);
    Stats stats = loss.stats(sums);
    const Real distance = kTeacher && loss.teacher == Teacher::kTV ? total_variation(stats, x, y) : Real(0);
    write(row, loss.values(sums, loss.softcap(logit)[0], distance),
          (target == 0 || logit[0] > before) && logit[0] >= rest);
    return stats;
  }

  template <bool kTeacher>
  DFLASH_MEMBER void backward(int64_t row, const T* x, const T* y, T* grad, const Stats& stats, Real scale) const {
    const int64_t target = params.target[row];
    // Read before the loop, which may overwrite the logits.
    const One z = loss.softcap(load<One>(x + target));
    const One teacher = kTeacher ? load<One>(y + target) : One{};
    const RowGradient<Real> gradient(loss, stats, scale);
    for_each(0, params.vocab, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
      using X = decltype(lanes);
      const X zi = loss.softcap(load<X>(x + i));
      const X yi = kTeacher ? load<X>(y + i) : X{};
      store(grad + i, gradient.template at<kTeacher>(zi, yi) * loss.softcap.slope(zi));
    });
    store(grad + target, (gradient.template at<kTeacher>(z, teacher) + gradient.of_target) * loss.softcap.slope(z));
  }

  DFLASH_MEMBER void write(int64_t row, const typename RowLoss<Real>::Values& values, bool correct) const {
    static_cast<Real*>(params.losses)[row] = weight(row) * values.loss;
    static_cast<Real*>(params.nll)[row] = values.nll;
    static_cast<Real*>(params.entropy)[row] = values.entropy;
    params.correct[row] = correct;
  }

  DFLASH_MEMBER Real weight(int64_t row) const {
    return params.weight ? static_cast<const Real*>(params.weight)[row] : Real(1);
  }

  DFLASH_MEMBER int64_t start(int64_t row, const RowStrides& strides) const {
    return row / params.inner * strides.outer + row % params.inner * strides.inner;
  }

  template <bool kTeacher>
  void run(int64_t row) const {
    const T* x = static_cast<const T*>(params.logits) + start(row, params.logits_strides);
    const T* y = kTeacher ? static_cast<const T*>(params.teacher) + start(row, params.teacher_strides) : nullptr;
    T* grad = static_cast<T*>(params.grad) + start(row, params.grad_strides);
    Stats* stats = reinterpret_cast<Stats*>(params.stats) + row;

    if (weight(row) == 0) {
      if (params.pass != Pass::kBackward) write(row, {}, false);
      if (params.pass == Pass::kForward) *stats = Stats{};
      if (params.pass != Pass::kForward) __builtin_memset(grad, 0, params.vocab * sizeof(T));
    } else if (params.pass == Pass::kForward) {
      *stats = forward<kTeacher>(row, x, y);
    } else if (params.pass == Pass::kBackward) {
      const Real upstream = static_cast<const Real*>(params.grad_losses)[row];
      backward<kTeacher>(row, x, y, grad, *stats, upstream * weight(row));
    } else {
      const Stats own = forward<kTeacher>(row, x, y);
      backward<kTeacher>(row, x, y, grad, own, weight(row));
    }
  }
};

template <class T, class Real>
static void run_rows(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  const CrossEntropyRow<T, Real> kernel{params, RowLoss<Real>(params)};
  for (int64_t row = begin; row < end; ++row) {
    kernel.loss.mix == 0 ? kernel.template run<false>(row) : kernel.template run<true>(row);
  }
}

void masked_cross_entropy(const CrossEntropyParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32: return run_rows<float, float>(params, begin, end);
    case DType::kFloat64: return run_rows<double, double>(params, begin, end);
    case DType::kBFloat16: return run_rows<bfloat16, float>(params, begin, end);
    case DType::kFloat16: return run_rows<float16, float>(params, begin, end);
  }
}

}  // namespace dflash::DFLASH_ISA
