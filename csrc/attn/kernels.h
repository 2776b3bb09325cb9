// The attention family's CUDA kernels. Launchers return null, or what CUDA says went wrong.
#pragma once

#include "attn/backward.h"
#include "attn/params.h"
#include "attn/plan.h"
#include "common/served.h"

namespace dflash {

// Calls launch<kDim>() with the smallest tile that holds the head dimension.
template <class Launch>
auto with_dim(int64_t head_dim, Launch&& launch) {
  if (head_dim <= 64) return launch.template operator()<64>();
  if (head_dim <= 128) return launch.template operator()<128>();
  if (head_dim <= 256) return launch.template operator()<256>();
  return launch.template operator()<512>();
}

const char* plan_sm80(const PlanParams& params, void* stream);

const char* forward_sm80(const AttentionForwardParams& params, void* stream);

// The tables and rows' statistics that a backward kernel reads, and the portable one.
const char* backward_prepare(const BackwardParams& params, void* stream);
const char* backward_sm80(const BackwardParams& params, void* stream);

#if defined(DFLASH_EXT_HOPPER) || defined(__CUDACC__)
// Whether the current device uses the kernels for Hopper; why the forward does not serve this call (PortableReason).
bool forward_sm90_runs_here();
uint32_t forward_sm90_misses(const AttentionForwardParams& params);
const char* forward_sm90(const AttentionForwardParams& params, void* stream);
#endif

}  // namespace dflash
