// The attention family's CUDA kernels. Launchers return null, or what CUDA says went wrong.
#pragma once

#include "attn/params.h"
#include "attn/plan.h"

namespace dflash {

const char* plan_sm80(const PlanParams& params, void* stream);

const char* forward_sm80(const AttentionForwardParams& params, void* stream);

#if defined(DFLASH_EXT_HOPPER) || defined(__CUDACC__)
// On Hopper: whether the current device is one, and whether the kernel serves this call there.
bool forward_sm90_runs_here();
bool forward_sm90_serves(const AttentionForwardParams& params);
const char* forward_sm90(const AttentionForwardParams& params, void* stream);
#endif

}  // namespace dflash
