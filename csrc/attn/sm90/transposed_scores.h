// Scores of 64 keys and 64 rows in the Hopper backward. They are transposed, so the rows of an accumulator are keys: a
// thread has key k and key k + 8, and of the rows 8j + 2t and 8j + 2t + 1, where t is its number modulo 4.
#pragma once

#include "attn/backward.h"
#include "attn/masking.h"
#include "attn/scores.h"

namespace dflash::DFLASH_ISA::sm90 {

using TransposedScores = float[32];

// s becomes 2^(s * factor - lse). `lse` begins at the thread's first row.
DFLASH_INLINE void take_exponentials(TransposedScores& s, const float* lse, float factor) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * j);
    s[4 * j] = exp2_of(fmaf(s[4 * j], factor, -pair.x));
    s[4 * j + 1] = exp2_of(fmaf(s[4 * j + 1], factor, -pair.y));
    s[4 * j + 2] = exp2_of(fmaf(s[4 * j + 2], factor, -pair.x));
    s[4 * j + 3] = exp2_of(fmaf(s[4 * j + 3], factor, -pair.y));
  }
}

// Sets s to zero where a row does not see a key. `row` is the thread's first row and `key` its first key. Row r has the
// keys of position r >> fold_bits.
DFLASH_INLINE void zero_unseen(TransposedScores& s, const RowKeys* keys, int row, int key, int fold_bits) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const RowKeys seen = keys[(row + 8 * j + e) >> fold_bits];
      if (!row_sees(seen, key)) s[4 * j + e] = 0;
      if (!row_sees(seen, key + 8)) s[4 * j + 2 + e] = 0;
    }
  }
}

}  // namespace dflash::DFLASH_ISA::sm90
