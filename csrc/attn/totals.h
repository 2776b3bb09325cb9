// The end of a row's softmax.
#pragma once

#include "attn/softmax.h"

namespace dflash::DFLASH_ISA {

// The sum of all columns, given those of each of the row's four lanes.
DFLASH_INLINE float total_of(float sum) {
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// A row that sees no key is zeros.
DFLASH_INLINE float inverse_of(float total) { return total == 0 ? 0.0f : 1 / total; }

}  // namespace dflash::DFLASH_ISA
