// The two products of attention as wgmma takes them: a warpgroup's 64 rows, a tile of keys and values in shared memory.
#pragma once

#include "attn/softmax.h"
#include "common/mma.h"
#include "common/tma.h"
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
    fence_accumulator(s);
    wgmma_fence();
    const uint64_t q = k_major_descriptor(opaque(queries)), k = k_major_descriptor(opaque(keys));
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      Wgmma<T, kKeys>::template ss<kMajorK, kMajorK>(s, q + (panel * kQueryPanelBytes + within) / 16,
                                      k + (panel * kKeyPanelBytes + within) / 16, step > 0);
    }
    wgmma_commit_group();
  }

  // Starts out += weights v.
  static DFLASH_INLINE void start_output(Output& out, const Weights& weights, uint32_t values) {
    fence_accumulator(out);
    wgmma_fence();
    const uint64_t v = mn_major_descriptor(values, kKeyPanelBytes);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      Wgmma<T, kColumns>::template rs<kMajorMN>(out, weights[step], v + step * 16 * kPanelRowBytes / 16, true);
    }
    wgmma_commit_group();
  }

  // Has the softmax of s done before the next wait for products, where ptxas likes to put arithmetic that should run
  // beside them: a store says so that never happens, sums not being negative.
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

  // Most tiles bring no row of a warp a new maximum.
  static DFLASH_INLINE void rescale(Output& out, const float (&correction)[2]) {
    if (!__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) return;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) out[i] *= correction[i / 2 % 2];
  }

  // Writes the rows, times `inverse`, to shared memory as the copy engine stores them.
  static DFLASH_INLINE void write_rows(uint32_t to, const Output& out, const float (&inverse)[2]) {
    // Lanes 0 to 15 give the addresses of rows 0 to 15 in one chunk of 8 columns, lanes 16 to 31 in the next.
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, chunk = threadIdx.x % 32 / 16;
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

  static DFLASH_INLINE void round_weights(Weights& weights, const Scored& s) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }
};

}  // namespace dflash::DFLASH_ISA
