// Warp-level matrix products (mma.sync), as every GPU from Ampere on has them.
//
// Fragments of a warp, lane l with g = l / 4 and t = l % 4:
//   accumulator 16 x 8   c[0..1] = (g, 2t..2t+1), c[2..3] = (g + 8, 2t..2t+1)
//   A 16 x 16            a[0] = (g, 2t..), a[1] = (g + 8, 2t..), a[2] = (g, 2t + 8..), a[3] = (g + 8, 2t + 8..)
//   B 16 x 8             b[0] = (k 2t.., column g), b[1] = (k 2t + 8.., column g)
// Two neighbouring accumulators, rounded, are therefore an A fragment. A wider accumulator holds one of 8 columns after
// the other, in wgmma as well.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// Element i of a thread's accumulator lies in its row lane / 4 + 8 * accumulator_row(i), and in column
// lane % 4 * 2 + accumulator_column(i).
DFLASH_INLINE constexpr int accumulator_row(int i) { return i / 2 % 2; }
DFLASH_INLINE constexpr int accumulator_column(int i) { return i / 4 * 8 + i % 2; }

// mma.sync.m16n8k16: c += a b
template <class T>
DFLASH_INLINE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (requires(T t) { __bfloat162float(t); }) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace dflash::DFLASH_ISA
