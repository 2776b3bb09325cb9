// The positions of drafts on a GPU, and the kernel that finds where each draft ends.
#pragma once

#include "common/launch.h"
#include "sample/row_tiles.h"

namespace dflash::DFLASH_ISA {

DFLASH_INLINE int64_t drafted_of(const VerifyParams& p, int64_t row) {
  return p.lens ? max(int64_t(0), min(p.lens[row], p.drafted)) : p.drafted;
}

DFLASH_INLINE int64_t offset_of(const RowStrides& strides, int64_t row, int64_t k) {
  return row * strides.outer + k * strides.inner;
}

constexpr int kResolveWarps = 4;

// A warp per draft finds the first position that was not accepted. verdict_of(params, row, k, is_bonus): kAccepted, or
// the token to commit at position k in the draft's place.
template <class Team, auto verdict_of>
__global__ void __launch_bounds__(32 * kResolveWarps) resolve_drafts(const VerifyParams params) {
  const int64_t row = int64_t(blockIdx.x) * kResolveWarps + warp_id();
  Team::wait_for_inputs();
  if (row >= params.rows) return;
  const int64_t drafted = drafted_of(params, row);
  for (int64_t base = 0; base <= drafted; base += 32) {
    const int64_t k = base + lane_id();
    const int32_t verdict = k <= drafted ? verdict_of(params, row, k, k == drafted) : kAccepted;
    const unsigned ends = __ballot_sync(~0u, verdict != kAccepted);
    if (ends == 0) continue;
    if (lane_id() == __ffs(ends) - 1) {
      params.accepted[row] = k;
      params.next_token[row] = verdict;
    }
    return;
  }
}

template <class Team, auto verdict_of>
cudaError_t launch_resolve(const VerifyParams& p, cudaStream_t stream) {
  LaunchShape shape{(p.rows + kResolveWarps - 1) / kResolveWarps, 32 * kResolveWarps};
  shape.overlaps_previous = Team::kOverlapsLaunches;
  return launch_kernel(resolve_drafts<Team, verdict_of>, shape, stream, p);
}

}  // namespace dflash::DFLASH_ISA
