// Copies between a batch's tokens and the ring of every slot. A block copies a part of one token, in pieces of up to 16
// bytes, one piece a thread.
#include <cstdint>

#include "common/dependent_launch.h"
#include "common/launch.h"
#include "cycle/params.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256;

template <class Piece, bool kIsWritten>
__global__ void __launch_bounds__(kThreads) ring_sm80(const RingParams params, const int64_t parts) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  wait_for_previous_kernel();
#endif
  const int64_t token = blockIdx.x / parts, row = token / params.tokens;
  const int64_t piece = blockIdx.x % parts * kThreads + threadIdx.x;
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
  const int64_t pieces = params.bytes / int64_t(sizeof(Piece)), parts = (pieces + kThreads - 1) / kThreads;
  const LaunchShape shape{.blocks = params.rows * params.tokens * parts,
                          .threads = kThreads,
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

}  // namespace
}  // namespace device

const char* write_ring_sm80(const RingParams& params, void* stream) { return device::copy_ring<true>(params, stream); }

const char* read_ring_sm80(const RingParams& params, void* stream) { return device::copy_ring<false>(params, stream); }

}  // namespace dflash
