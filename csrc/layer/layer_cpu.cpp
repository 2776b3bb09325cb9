// The kernels between the products of a layer, on the CPU.
#include "common/rms_norm_cpu.h"
#include "common/rope_cpu.h"
#include "common/simd.h"
#include "layer/activation.h"
#include "layer/params.h"

namespace dflash::DFLASH_ISA {

// The kernel runs over rows.
void add_rms_norm(const AddRmsNormParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const Array<T> normed(p.update_norm ? p.width : 1);
    const auto* norm = static_cast<const T*>(p.norm);
    for (int64_t row = begin; row < end; ++row) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.width;
      const T* update = p.update ? static_cast<const T*>(p.update) + row * p.update_stride : nullptr;
      if (p.update_norm) {
        normalise<Real>(normed.data(), update, static_cast<const T*>(p.update_norm), p.width, p.eps, p.plus_one);
        update = normed.data();
      }
      if (update) {
        T* total = static_cast<T*>(p.total) + row * p.width;
        for_each_lanes<Real>(p.width, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
          using X = decltype(lanes);
          store(total + i, load<X>(residual + i) + load<X>(update + i));
        });
        residual = total;
      }
      normalise<Real>(static_cast<T*>(p.out) + row * p.width, residual, norm, p.width, p.eps, p.plus_one);
    }
  });
}

namespace {

template <class T, class Real>
class HeadRotation {
 public:
  explicit HeadRotation(const RotateToCacheParams& p) : p_(p), head_(p.head_dim) {}

  void run(int64_t row_of_all) const {
    const int64_t entry = row_of_all / p_.rows, row = row_of_all % p_.rows;
    const int64_t place = p_.places[row_of_all], cache = p_.caches[entry];
    const T* in = static_cast<const T*>(p_.projected) + row_of_all * p_.stride;
    for (int64_t head = 0; head < p_.heads; ++head, in += p_.head_dim) {
      rotate(in, static_cast<const T*>(p_.q_norm), row_of_all);
      write(p_.queries, entry, head, row, head_.data());
    }
    if (place < 0) return;
    for (int64_t head = 0; head < p_.kv_heads; ++head, in += p_.head_dim) {
      rotate(in, static_cast<const T*>(p_.k_norm), row_of_all);
      write(p_.keys, cache, head, place, head_.data());
    }
    for (int64_t head = 0; head < p_.kv_heads; ++head, in += p_.head_dim) write(p_.values, cache, head, place, in);
  }

 private:
  void rotate(const T* in, const T* gain, int64_t row_of_all) const {
    Real* head = head_.data();
    if (gain) {
      normalise<Real>(head, in, gain, p_.head_dim, p_.eps, p_.plus_one);
    } else {
      for_each_lanes<Real>(p_.head_dim, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
        store(head + i, load<decltype(lanes)>(in + i));
      });
    }
    const int64_t position = p_.positions[row_of_all] < 0 ? 0 : p_.positions[row_of_all];
    const Real* cos = static_cast<const Real*>(p_.cos) + position * p_.angles;
    const Real* sin = static_cast<const Real*>(p_.sin) + position * p_.angles;
    rotate_halves(head, cos, sin, p_.angles);
  }

  template <class From>
  void write(const HeadRows& to, int64_t entry, int64_t head, int64_t row, const From* from) const {
    T* out = static_cast<T*>(to.base) + entry * to.entry + head * to.head + row * to.row;
    for_each_lanes<Real>(p_.head_dim, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
      store(out + i, load<decltype(lanes)>(from + i));
    });
  }

  const RotateToCacheParams& p_;
  const Array<Real> head_;
};

}  // namespace

// The kernel runs over the rows of all entries.
void rotate_to_cache(const RotateToCacheParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    const HeadRotation<decltype(element), decltype(real)> rotation(p);
    for (int64_t row = begin; row < end; ++row) rotation.run(row);
  });
}

// The kernel runs over the elements of the result.
void gated(const GatedParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / p.width, column = at % p.width;
      const int64_t left = p.width - column, count = left < end - at ? left : end - at;
      const T* gate = static_cast<const T*>(p.gate) + row * p.stride + column;
      const T* up = static_cast<const T*>(p.up) + row * p.stride + column;
      T* out = static_cast<T*>(p.out) + at;
      for_each_lanes<Real>(count, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
        using X = decltype(lanes);
        store(out + i, activated<Real>(p.activation, load<X>(gate + i)) * load<X>(up + i));
      });
      at += count;
    }
  });
}

// The kernel runs over rows.
void add_halves(const AddHalvesParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, [&](auto element, auto real) {
    using T = decltype(element);
    using Real = decltype(real);
    const Array<T> sums(p.width);
    for (int64_t row = begin; row < end; ++row) {
      T* product = static_cast<T*>(p.product) + row * p.stride;
      T* to = p.out ? sums.data() : product;
      const bool has_adapter = row % p.entry_rows >= p.first;
      for (int64_t column = 0; column < p.width && (has_adapter || p.out); ++column) {
        const int64_t piece = (column >= p.ends[0]) + (column >= p.ends[1]);
        const T* inner = static_cast<const T*>(p.inner) + row * p.inner_stride + p.inner_at[piece];
        const T* halves = static_cast<const T*>(p.halves) + column * p.rank;
        Real total = load<Vector<Real, 1>>(product + column)[0];
        for_each_lanes<Real>(has_adapter ? p.rank : 0, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
          using X = decltype(lanes);
          total += sum_lanes(load<X>(inner + i) * load<X>(halves + i));
        });
        store(to + column, Vector<Real, 1>{total});
      }
      if (!p.out) continue;
      const int64_t width = p.width / 2;
      T* out = static_cast<T*>(p.out) + row * width;
      for_each_lanes<Real>(width, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
        using X = decltype(lanes);
        store(out + i, activated<Real>(p.activation, load<X>(to + i)) * load<X>(to + width + i));
      });
    }
  });
}

}  // namespace dflash::DFLASH_ISA
