// The two ends of a decoding cycle, with one warp a row, and the clock.
#include "common/launch.h"
#include "cycle/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

__global__ void __launch_bounds__(kThreads) begin_cycle_sm80(const BeginCycleParams params) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row < params.rows) begin_cycle_row(params, row, threadIdx.x % 32, 32);
}

__global__ void __launch_bounds__(kThreads) end_cycle_sm80(const EndCycleParams params) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= params.rows) return;
  const int lane = threadIdx.x % 32;
  const bool stopped = __any_sync(~0u, finds_stop(params, row, lane, 32));
  end_cycle_row(params, row, stopped, lane, 32);
}

__global__ void mark_time_sm80(int64_t* nanoseconds) {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  *nanoseconds = static_cast<int64_t>(now);
}

LaunchShape shape_of(int64_t rows) { return {.blocks = (rows + kWarps - 1) / kWarps, .threads = kThreads}; }

}  // namespace
}  // namespace device

const char* begin_cycle_sm80(const BeginCycleParams& params, void* stream) {
  return checked_launch([&] {
    return launch_kernel(device::begin_cycle_sm80, device::shape_of(params.rows), static_cast<cudaStream_t>(stream), params);
  });
}

const char* mark_time_sm80(int64_t* nanoseconds, void* stream) {
  return checked_launch([&] {
    return launch_kernel(device::mark_time_sm80, {.blocks = 1, .threads = 1}, static_cast<cudaStream_t>(stream),
                         nanoseconds);
  });
}

const char* end_cycle_sm80(const EndCycleParams& params, void* stream) {
  return checked_launch([&] {
    return launch_kernel(device::end_cycle_sm80, device::shape_of(params.rows), static_cast<cudaStream_t>(stream), params);
  });
}

}  // namespace dflash
