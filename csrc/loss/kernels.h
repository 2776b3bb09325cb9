// The loss family's kernels.
#pragma once

#include "loss/params.h"

namespace dflash {

// CUDA launchers return null, or what CUDA says went wrong.
const char* masked_cross_entropy_sm80(const CrossEntropyParams& params, void* stream);

}  // namespace dflash
