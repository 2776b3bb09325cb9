// Writes projections to the caches as keys and values, on the CPU: bias, norms and rotary embedding, one head after
// another in a buffer that fits in the L1 cache.
#include "common/rms_norm_cpu.h"
#include "common/rope_cpu.h"
#include "common/simd.h"
#include "kv/params.h"

namespace dflash::DFLASH_ISA {

template <class T, class Real>
class KvWriter {
 public:
  explicit KvWriter(const KvWriteParams& p) : p_(p), head_(p.head_dim) {}

  void write(int64_t token, int64_t layer) const {
    const int64_t slot = p_.slots[token];
    if (slot < 0) return;
    const int64_t width = p_.heads * p_.head_dim, start = layer * 2 * width;
    const T* projected = static_cast<const T*>(p_.projected) + token * p_.layers * 2 * width + start;
    const Real* bias = p_.bias ? static_cast<const Real*>(p_.bias) + start : nullptr;
    for (int64_t head = 0; head < p_.heads; ++head) {
      const int64_t k = head * p_.head_dim, v = k + width;
      read(projected + k, bias ? bias + k : nullptr);
      if (p_.k_norm && !p_.norm_after_rope) normalise_head(k_gain(layer));
      rotate(token, layer);
      if (p_.k_norm && p_.norm_after_rope) normalise_head(k_gain(layer));
      store_head(p_.k_caches[layer], token, head, slot);

      read(projected + v, bias ? bias + v : nullptr);
      if (p_.v_norm) normalise_head(nullptr);
      store_head(p_.v_caches[layer], token, head, slot);
    }
  }

 private:
  const Real* k_gain(int64_t layer) const { return static_cast<const Real*>(p_.k_norm) + layer * p_.head_dim; }

  void read(const T* x, const Real* bias) const {
    Real* head = head_.data();
    for_each_lanes<Real>(p_.head_dim, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
      using X = decltype(lanes);
      const X value = load<X>(x + i);
      store(head + i, bias ? value + load<X>(bias + i) : value);
    });
  }

  // Without a gain the norm has no weight.
  void normalise_head(const Real* gain) const {
    normalise<Real>(head_.data(), head_.data(), gain, p_.head_dim, p_.norm_eps, p_.norm_plus_one);
  }

  void rotate(int64_t token, int64_t layer) const {
    const int64_t row = layer * p_.by_layer + p_.positions[token] * p_.angles;
    const Real *cos = static_cast<const Real*>(p_.cos) + row, *sin = static_cast<const Real*>(p_.sin) + row;
    Real* head = head_.data();
    if (p_.rope_interleaved) {
      for (int64_t i = 0; i < p_.angles; ++i) {
        const Real first = head[2 * i], second = head[2 * i + 1];
        head[2 * i] = first * cos[i] - second * sin[i];
        head[2 * i + 1] = second * cos[i] + first * sin[i];
      }
      return;
    }
    rotate_halves(head, cos, sin, p_.angles);
  }

  void store_head(const KvCache& cache, int64_t token, int64_t head, int64_t slot) const {
    int64_t outer = token / p_.length;
    if (p_.block_table) {
      outer = p_.block_table[outer * p_.max_pages + slot / p_.page_size];
      slot %= p_.page_size;
    }
    const int64_t offset = outer * cache.outer + head * cache.head + slot * cache.slot;
    with_types(p_.cache_dtype, [&](auto element, auto real) DFLASH_LAMBDA {
      if constexpr (sizeof(real) == sizeof(Real)) {
        auto* out = static_cast<decltype(element)*>(cache.base) + offset;
        for_each_lanes<Real>(p_.head_dim, [&](auto lanes, int64_t i) DFLASH_LAMBDA {
          store(out + i, load<decltype(lanes)>(head_.data() + i));
        });
      }
    });
  }

  const KvWriteParams& p_;
  const Array<Real> head_;
};

// The kernel runs over pairs of a token and a layer.
void kv_write(const KvWriteParams& params, int64_t begin, int64_t end) {
  with_types(params.dtype, [&](auto element, auto real) {
    const KvWriter<decltype(element), decltype(real)> writer(params);
    for (int64_t i = begin; i < end; ++i) writer.write(i / params.layers, i % params.layers);
  });
}

}  // namespace dflash::DFLASH_ISA
