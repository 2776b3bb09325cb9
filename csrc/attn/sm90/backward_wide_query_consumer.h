// The consumer of queries of the wide Hopper backward, a warpgroup (backward_wide_sm90.cu).
#pragma once

#include "attn/sm90/backward_wide_tiling.h"
#include "attn/sm90/turns.h"
#include "common/named_barrier.h"

namespace dflash::DFLASH_ISA::sm90 {

// Adds dQ to the sums in global memory straight from registers. This warpgroup needs no fence, which would wait for the
// additions.
template <class T, class Tiling>
class WideQueryConsumer {
  static constexpr int kColumns = 64;  // that it computes at a time
  using GradQ = float[kColumns / 2];

 public:
  DFLASH_INLINE WideQueryConsumer(const BackwardParams& p, WideBackwardShared<Tiling>& shared, uint32_t memory)
      : p_(p), shared_(shared), memory_(memory) {}

  DFLASH_INLINE void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      shared_.kv_full.wait(parity);
      const BackwardItem& item = shared_.items[parity];
      if (item.key_tile < 0) break;
      for (int left = item.end - item.begin; left > 0; --left) work_on_unit();
      named_barrier_arrive(kKeysAreRead, 3 * kWarpgroup);
      if (threadIdx.x % kWarpgroup == 0) shared_.kv_empty.arrive();
    }
  }

 private:
  DFLASH_INLINE void work_on_unit() {
    const int rank = cluster_rank();
    shared_.scores_full.wait(turn_ % 2);
    const uint32_t stage = turn_++ % Tiling::kStages;
    const int64_t index = shared_.units[stage].index;
    const int turn = shared_.units[stage].turn;
    int32_t* const added = p_.rows_added + index * Tiling::kBlocks + rank;
    float* to = p_.grad_q_sums + index * (Tiling::kRows * Tiling::kDim) +
                rank * Tiling::kGradQPanels * (Tiling::kRows * kColumns) + threadIdx.x % kWarpgroup * 4;
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared_.queries_empty[stage].arrive();
#pragma unroll
    for (int panel = 0; panel < Tiling::kGradQPanels; ++panel) {
      GradQ grad_q;
      start(grad_q, rank, panel);
      wgmma_wait_group<0>();
      fence_accumulator(grad_q);
      if (panel == Tiling::kGradQPanels - 1 && threadIdx.x % 32 == 0) {
        shared_.scores_empty.arrive();
        if (!Tiling::kSplitsColumns) arrive_remotely(map_to_rank(shared_address(&shared_.scores_empty), 1 - rank));
      }
      if (panel == 0 && p_.is_deterministic) {
        if (threadIdx.x % kWarpgroup == 0) wait_for_turn(added, turn);
        named_barrier_sync(kQueryThreads, kWarpgroup);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float* const x = grad_q + 4 * j;
        red_add_v4(to + j * kWarpgroup * 4, x[0], x[1], x[2], x[3]);
      }
      to += Tiling::kRows * kColumns;
    }
    if (!p_.is_deterministic) return;
    named_barrier_sync(kQueryThreads, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) count_up(added);
  }

  // Starts grad_q = dS k, for one of the block's panels of columns.
  DFLASH_INLINE void start(GradQ& grad_q, int rank, int panel) const {
    fence_accumulator(grad_q);
    wgmma_fence();
    const int own_panel = (Tiling::kSplitsColumns ? 0 : rank * Tiling::kGradQPanels) + panel;
    const uint64_t grad_s = mn_major_descriptor(opaque(memory_ + Tiling::kScoresAt), 0);
    const uint64_t own_keys = mn_major_descriptor(opaque(memory_ + own_panel * Tiling::kPanelBytes), 0);
    const uint64_t other_keys =
        mn_major_descriptor(opaque(memory_ + Tiling::kOtherKeysAt + panel * Tiling::kPanelBytes), 0);
#pragma unroll
    for (int step = 0; step < Tiling::kKeys / 16; ++step) {
      constexpr int kSteps = Tiling::kConsumerKeys / 16;
      const int at = step % kSteps * 16 * kPanelRowBytes / 16;
      const int other = (Tiling::kOtherAt - Tiling::kScoresAt) / 16;
      Wgmma<T, kColumns>::template ss<kMajorMN, kMajorMN>(grad_q, grad_s + at + (step < kSteps ? 0 : other),
                                                          (step < kSteps ? own_keys : other_keys) + at, step > 0);
    }
    wgmma_commit_group();
  }

  const BackwardParams& p_;
  WideBackwardShared<Tiling>& shared_;
  const uint32_t memory_;
  uint32_t turn_ = 0;
};

}  // namespace dflash::DFLASH_ISA::sm90
