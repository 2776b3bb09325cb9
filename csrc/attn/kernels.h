// The launchers of the attention family's CUDA kernels. They return null, or CUDA's error message.
#pragma once

#include "attn/backward.h"
#include "attn/params.h"
#include "attn/plan.h"
#include "common/served.h"

namespace dflash {

const char* plan_sm80(const PlanParams& params, void* stream);

const char* forward_sm80(const AttentionForwardParams& params, void* stream);

// backward_prepare writes the table and the rows' statistics; backward_sm80 is the portable backward, which reads them.
const char* backward_prepare(const BackwardParams& params, void* stream);
const char* backward_sm80(const BackwardParams& params, void* stream);

#if defined(DFLASH_EXT_HOPPER) || defined(__CUDACC__)
// Whether the current device uses Hopper kernels, and why the forward does not serve a call (PortableReason).
bool forward_sm90_runs_here();
uint32_t forward_sm90_misses(const AttentionForwardParams& params);
const char* forward_sm90(const AttentionForwardParams& params, void* stream);

// backward_sm90_layout sets how the work is shared out. backward_sm90 reads what backward_prepare wrote. Its first
// launch is backward_deal_sm90; above head_dim 128 backward_wide_sm90 and backward_finish_sm90 follow.
uint32_t backward_sm90_misses(const BackwardParams& params, bool deterministic);
void backward_sm90_layout(BackwardParams& params, void* stream);
const char* backward_sm90(const BackwardParams& params, void* stream);
const char* backward_wide_sm90(const BackwardParams& params, void* stream);
const char* backward_deal_sm90(const BackwardParams& params, void* stream);
const char* backward_finish_sm90(const BackwardParams& params, void* stream);
#endif

}  // namespace dflash
