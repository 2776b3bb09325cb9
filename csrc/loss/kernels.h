// The loss family's CUDA kernels. Launchers return null, or what CUDA says went wrong.
#pragma once

#include "loss/params.h"

namespace dflash {

const char* masked_cross_entropy_sm80(const CrossEntropyParams& params, void* stream);

// The in-place pass on Hopper, for the layouts that `serves` accepts on the current device.
bool masked_cross_entropy_sm90_serves(const CrossEntropyParams& params);
const char* masked_cross_entropy_sm90(const CrossEntropyParams& params, void* stream);

}  // namespace dflash
