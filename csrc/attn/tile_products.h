// The two products of attention as wgmma takes them: a warpgroup's 64 rows, a tile of keys and values in shared memory.
#pragma once

#include "attn/softmax.h"
#include "common/mma.h"
#include "common/wgmma.h"

namespace dflash::DFLASH_ISA {

constexpr int kQueryPanelBytes = 64 * kPanelRowBytes;  // the rows of one warpgroup

// kColumns of the kDim columns of values are the warpgroup's own.
template <class T, int kKeys, int kDim, int kColumns>
struct TileProducts {
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
  using Scored = float[kKeys / 2];
  using Weights = uint32_t[kKeys / 16][4];
  using Output = float[kColumns / 2];

  // Starts s = q k^T.
  static DFLASH_INLINE void start_scores(Scored& s, uint32_t queries, uint32_t keys) {
    pin(s);
    begin_products();
    const uint64_t q = row_operand(renewed(queries)), k = row_operand(renewed(keys));
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Product<T, kKeys>::rows_by_rows(s, q + (panel * kQueryPanelBytes + within) / 16,
                                      k + (panel * kKeyPanelBytes + within) / 16, step > 0);
    }
    commit_products();
  }

  // Starts out += weights v.
  static DFLASH_INLINE void start_output(Output& out, const Weights& weights, uint32_t values) {
    pin(out);
    begin_products();
    const uint64_t v = column_operand(values, kKeyPanelBytes);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      Product<T, kColumns>::registers_by_columns(out, weights[step], v + step * 16 * kPanelRowBytes / 16, true);
    }
    commit_products();
  }

  // Most tiles bring no row of a warp a new maximum.
  static DFLASH_INLINE void rescale(Output& out, const float (&correction)[2]) {
    if (!__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) out[i] *= correction[i / 2 % 2];
  }

  static DFLASH_INLINE void round_weights(Weights& weights, const Scored& s) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
};

}  // namespace dflash::DFLASH_ISA
