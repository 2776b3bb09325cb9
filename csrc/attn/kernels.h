// The attention family's CUDA kernels. Launchers return null, or what CUDA says went wrong.
#pragma once

#include "attn/params.h"
#include "attn/plan.h"

namespace dflash {

const char* plan_sm80(const PlanParams& params, void* stream);

const char* forward_sm80(const AttentionForwardParams& params, void* stream);

// On Hopper, for the layouts that `serves` accepts on the current device.
bool forward_sm90_serves(const AttentionForwardParams& params);
const char* forward_sm90(const AttentionForwardParams& params, void* stream);

}  // namespace dflash
