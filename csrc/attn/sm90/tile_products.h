// The two products of attention by wgmma, for one warpgroup: 64 rows of queries against a tile of keys and values in
// shared memory, all in panels of 64 columns (common/wgmma.h). The panels of a tile follow one another.
#pragma once

#include "attn/softmax.h"
#include "common/mma.h"
#include "common/tma.h"
#include "common/wgmma.h"

namespace dflash::DFLASH_ISA::sm90 {

constexpr int kQueryPanelBytes = 64 * kPanelRowBytes;  // the rows of one warpgroup

// Starts d = a b^T, or d += a b^T, with kDim columns, both K-major in shared memory. Panels of a and b begin
// kAPanelBytes and kBPanelBytes after one another. A commit must follow.
template <class T, int kN, int kDim, int kAPanelBytes, int kBPanelBytes, bool kAdds = false>
DFLASH_INLINE void start_row_products(float (&d)[kN / 2], uint32_t a, uint32_t b) {
  fence_accumulator(d);
  wgmma_fence();
  const uint64_t a_start = k_major_descriptor(opaque(a)), b_start = k_major_descriptor(opaque(b));
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int panel = step / 4, within = step % 4 * 32;
    Wgmma<T, kN>::template ss<kMajorK, kMajorK>(d, a_start + (panel * kAPanelBytes + within) / 16,
                                                b_start + (panel * kBPanelBytes + within) / 16, kAdds || step > 0);
  }
}

// Starts d += a b, where a is in registers and the kSum rows of b are in shared memory, in panels that begin
// kPanelBytes after one another. A commit must follow.
template <class T, int kN, int kSum, int kPanelBytes>
DFLASH_INLINE void start_register_products(float (&d)[kN / 2], const uint32_t (&a)[kSum / 16][4], uint32_t b) {
  fence_accumulator(d);
  wgmma_fence();
  const uint64_t b_start = mn_major_descriptor(b, kPanelBytes);
#pragma unroll
  for (int step = 0; step < kSum / 16; ++step) {
    Wgmma<T, kN>::template rs<kMajorMN>(d, a[step], b_start + step * 16 * kPanelRowBytes / 16, true);
  }
}

// Rounds an accumulator to the fragments that are the first operand of the next product.
template <class T, int kCount>
DFLASH_INLINE void round_to_fragments(uint32_t (&fragments)[kCount / 8][4], const float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) fragments[i / 4][i % 4] = pack<T>(x[2 * i], x[2 * i + 1]);
}

// kColumns of the kDim columns of the values are the warpgroup's own.
template <class T, int kKeys, int kDim, int kColumns>
struct TileProducts {
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  using Scored = float[kKeys / 2];
  using Weights = uint32_t[kKeys / 16][4];
  using Output = float[kColumns / 2];

  // Starts s = q k^T.
  static DFLASH_INLINE void start_scores(Scored& s, uint32_t queries, uint32_t keys) {
    start_row_products<T, kKeys, kDim, kQueryPanelBytes, kKeyPanelBytes>(s, queries, keys);
    wgmma_commit_group();
  }

  // Starts out += weights v.
  static DFLASH_INLINE void start_output(Output& out, const Weights& weights, uint32_t values) {
    start_register_products<T, kColumns, kKeys, kKeyPanelBytes>(out, weights, values);
    wgmma_commit_group();
  }

  static DFLASH_INLINE void round_weights(Weights& weights, const Scored& s) { round_to_fragments<T>(weights, s); }

  // The step that overlaps the softmax with a product. In flight are the scores s of the next keys and, after them, the
  // product of the previous weights and values. The scores are waited for first; add_scores(s, correction) takes their
  // softmax while the other product still runs. The weights then become those of s. release_keys() and
  // release_values() are called as soon as the products have read their operand. `shared` is any shared address.
  template <class AddScores, class ReleaseKeys, class ReleaseValues>
  static DFLASH_INLINE void overlap(Scored& s, Weights& weights, Output& out, const OnlineSoftmax& softmax,
                                    uint32_t shared, ReleaseKeys release_keys, AddScores add_scores,
                                    ReleaseValues release_values) {
    float correction[2];
    wgmma_wait_group<1>();
    release_keys();
    fence_accumulator(s);
    add_scores(s, correction);
    finish_softmax(softmax, s, shared);
    wgmma_wait_group<0>();
    release_values();
    fence_accumulator(out);
    rescale(out, correction);
    round_weights(weights, s);
  }

  // Writes the rows, times `inverse`, to shared memory in the swizzled panels that tma_store reads. `thread` may be
  // opaque, so that the compiler keeps no addresses in registers over the loop before.
  static DFLASH_INLINE void write_rows(uint32_t to, const Output& out, const float (&inverse)[2],
                                       uint32_t thread = threadIdx.x) {
    // Lanes 0 to 15 give stmatrix the addresses of rows 0 to 15 in one chunk of 8 columns, lanes 16 to 31 in the next.
    const int row = thread % 128 / 32 * 16 + thread % 16, chunk = thread % 32 / 16;
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      const float* const x = out + pair * 8;
      const uint32_t address = to + pair / 4 * kQueryPanelBytes + row * kPanelRowBytes +
                               ((pair % 4 * 2 + chunk) ^ (row % 8)) * 16;
      stmatrix_x4(address, pack<T>(x[0] * inverse[0], x[1] * inverse[0]),
                  pack<T>(x[2] * inverse[1], x[3] * inverse[1]), pack<T>(x[4] * inverse[0], x[5] * inverse[0]),
                  pack<T>(x[6] * inverse[1], x[7] * inverse[1]));
    }
    fence_proxy_async();
  }

 private:
  // Makes ptxas finish the softmax of s before the next wait for products. Without it ptxas moves the wait ahead of the
  // softmax, and nothing overlaps. It is a predicated store that never happens, because sums are not negative.
  static DFLASH_INLINE void finish_softmax(const OnlineSoftmax& softmax, Scored& s, uint32_t shared) {
    fence_accumulator(s);
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.lt.f32 never, %0, 0f00000000;\n"
        "@never st.shared.f32 [%1], %0;\n"
        "}\n" ::"f"(fminf(softmax.sum[0], softmax.sum[1])),
        "r"(shared)
        : "memory");
  }

  // Rescaling is skipped when no row of the warp has a new maximum, which is true of most tiles.
  static DFLASH_INLINE void rescale(Output& out, const float (&correction)[2]) {
    if (!__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) out[i] *= correction[accumulator_row(i)];
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
