// The launchers of the sampling family's CUDA kernels. They return null, or CUDA's error message.
#pragma once

#include "sample/params.h"

namespace dflash {

const char* sample_sm80(const SampleParams& params, void* stream);
const char* verify_sm80(const VerifyParams& params, void* stream);
const char* reveal_sm80(const RevealParams& params, void* stream);
const char* scaled_exp_sm80(const ScaledExpParams& params, void* stream);
const char* weighted_draw_sm80(const WeightedDrawParams& params, void* stream);

// On Hopper several blocks may share a row. `serves` says whether they should, on the current device.
bool sample_sm90_serves(const SampleParams& params, void* stream);
bool verify_sm90_serves(const VerifyParams& params, void* stream);
const char* sample_sm90(const SampleParams& params, void* stream);
const char* verify_sm90(const VerifyParams& params, void* stream);

}  // namespace dflash
