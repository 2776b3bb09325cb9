// The two ends of a decoding cycle, with one warp a row, the ring of what waits, and the clock.
#include "common/dependent_launch.h"
#include "common/launch.h"
#include "cycle/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kCopyThreads = 256;

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

// Copies between the tokens of a batch and the ring. A block copies a part of one token, one piece a thread.
template <class Piece, bool kIsWritten>
__global__ void __launch_bounds__(kCopyThreads) ring_sm80(const RingParams params, const int64_t parts) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  wait_for_previous_kernel();
#endif
  const int64_t token = blockIdx.x / parts, row = token / params.tokens;
  const int64_t piece = blockIdx.x % parts * kCopyThreads + threadIdx.x;
  const int64_t position =
      kIsWritten ? params.positions[token] : waiting_position(params, row, token % params.tokens);
  if (!kIsWritten && piece == 0) params.positions[token] = position;
  if (piece >= params.bytes / int64_t(sizeof(Piece))) return;
  Piece* value = reinterpret_cast<Piece*>(params.values + token * params.bytes) + piece;
  if (position < 0) {
    if (!kIsWritten) *value = Piece{};
    return;
  }
  Piece* place = reinterpret_cast<Piece*>(place_in_ring(params, row, position)) + piece;
  if (kIsWritten) {
    *place = *value;
  } else {
    *value = *place;
  }
}

template <class Piece, bool kIsWritten>
cudaError_t launch_ring(const RingParams& params, cudaStream_t stream) {
  const int64_t pieces = params.bytes / int64_t(sizeof(Piece)), parts = (pieces + kCopyThreads - 1) / kCopyThreads;
  const LaunchShape shape{.blocks = params.rows * params.tokens * parts,
                          .threads = kCopyThreads,
                          .overlaps_previous = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9};
  return launch_kernel(ring_sm80<Piece, kIsWritten>, shape, stream, params, parts);
}

// Launches with the largest pieces that every token begins and ends with.
template <bool kIsWritten>
const char* copy_ring(const RingParams& params, void* stream) {
  const uint64_t all = uint64_t(params.bytes) | uint64_t(params.ring) | uint64_t(params.values);
  return checked_launch([&] {
    const auto to = static_cast<cudaStream_t>(stream);
    if (all % 16 == 0) return launch_ring<uint4, kIsWritten>(params, to);
    if (all % 8 == 0) return launch_ring<uint2, kIsWritten>(params, to);
    if (all % 4 == 0) return launch_ring<uint32_t, kIsWritten>(params, to);
    if (all % 2 == 0) return launch_ring<uint16_t, kIsWritten>(params, to);
    return launch_ring<uint8_t, kIsWritten>(params, to);
  });
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

const char* write_ring_sm80(const RingParams& params, void* stream) { return device::copy_ring<true>(params, stream); }

const char* read_ring_sm80(const RingParams& params, void* stream) { return device::copy_ring<false>(params, stream); }

}  // namespace dflash
