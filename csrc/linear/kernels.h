// The launcher of the linear family's Hopper kernel. It returns null, or CUDA's error message.
#pragma once

#include "linear/params.h"

namespace dflash {

// Whether the kernel serves the call on the current device: bfloat16 or float16 on a Hopper GPU, inner a multiple of 8,
// and x, weight and norm aligned to 16 bytes.
bool linear_sm90_serves(const LinearParams& params);
const char* linear_sm90(const LinearParams& params, void* stream);

}  // namespace dflash
