// IntervalMask.decode in one launch: a thread writes the bounds of one row.
#include "attn/decode_mask.h"
#include "common/launch.h"

namespace dflash {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) interval_mask_decode_sm80(const DecodeMaskParams p) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < p.entries * p.block_len) set_decode_bounds(p, row / p.block_len, row % p.block_len);
}

}  // namespace

const char* decode_mask_sm80(const DecodeMaskParams& params, void* stream) {
  return checked_launch([&] {
    const LaunchShape shape{.blocks = (params.entries * params.block_len + kThreads - 1) / kThreads,
                            .threads = kThreads};
    return launch_kernel(interval_mask_decode_sm80, shape, static_cast<cudaStream_t>(stream), params);
  });
}

}  // namespace dflash
