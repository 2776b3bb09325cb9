// The launchers of the loss family's CUDA kernels. They return null, or CUDA's error message.
#pragma once

#include "common/served.h"
#include "loss/params.h"

namespace dflash {

const char* masked_cross_entropy_sm80(const CrossEntropyParams& params, void* stream);

// The in-place pass on Hopper, and why it does not serve a call on the current device (PortableReason).
uint32_t masked_cross_entropy_sm90_misses(const CrossEntropyParams& params);
const char* masked_cross_entropy_sm90(const CrossEntropyParams& params, void* stream);

}  // namespace dflash
