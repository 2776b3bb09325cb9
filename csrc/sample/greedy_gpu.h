// Verification on a GPU where the host knows that all rows are greedy. Each block finds the largest logit of a part of a
// row by itself, and the kernel that resolves drafts compares the parts.
#pragma once

#include "sample/positions_gpu.h"
#include "sample/row_batches.h"

namespace dflash::DFLASH_ISA {

// A logit and its token as one number, which is larger for a larger logit, and for the first of equal logits.
DFLASH_INLINE uint64_t ranked(float logit, uint32_t token) {
  const uint32_t ordered = uint32_t(ordered_bits(logit + 0.f)) ^ 0x80000000u;  // -0 becomes 0
  return uint64_t(ordered) << 32 | uint32_t(~token);
}
DFLASH_INLINE int32_t token_of(uint64_t ranked) { return ~uint32_t(ranked); }

// A block writes the largest logit of a part of a position. NaN is none; a part of nothing but -inf has token 0.
template <class Source, class Team>
__global__ void __launch_bounds__(kThreads, 2) rank_parts(const VerifyParams params) {
  constexpr int kCount = kArgmaxPart / kThreads / Source::kSize;
  __shared__ uint64_t of_warps[kWarps];
  const uint32_t parts = argmax_parts(params.vocab), n = blockIdx.x / parts, positions = params.drafted + 1;
  const uint32_t begin = blockIdx.x % parts * kArgmaxPart;
  const int64_t row = n / positions, k = n % positions, offset = offset_of(params.target_strides, row, k);
  prefetch_tokens(typename Source::Raw(params.target, params.dtype, offset, params.vocab), begin, begin + kArgmaxPart);
  Team::wait_for_inputs();
  if (k > drafted_of(params, row)) return;
  const auto logits = logits_of<Source>(params.target, params.dtype, offset, params.vocab, params.penalties, row,
                                        params.tokens + row * params.drafted, k);
  float best = -kInfinity;
  uint32_t token = 0;
  const uint32_t begin_of_warp = begin + warp_id() * (kArgmaxPart / kWarps);
  with_batch<kCount>(logits, begin_of_warp, [&](const auto& batch) {
    batch.for_each([&](int, uint32_t first, const auto& chunk) {
#pragma unroll
      for (int i = 0; i < Source::kSize; ++i) {
        const float own = to_float(chunk.values[i]);
        if (own > best) {
          best = own;
          token = first + i;
        }
      }
    });
  });
  const float best_of_warp = warp_max(best);
  token = __reduce_min_sync(~0u, best == best_of_warp ? token : ~0u);
  if (lane_id() == 0) of_warps[warp_id()] = ranked(best_of_warp, token);
  __syncthreads();
  if (threadIdx.x > 0) return;
  uint64_t largest = of_warps[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) largest = max(largest, of_warps[w]);
  params.largest[blockIdx.x] = largest;
}

DFLASH_INLINE int32_t greedy_verdict(const VerifyParams& p, int64_t row, int64_t k, bool is_bonus) {
  const int64_t parts = argmax_parts(p.vocab);
  const uint64_t* const of_parts = p.largest + (row * (p.drafted + 1) + k) * parts;
  uint64_t largest = of_parts[0];
#pragma unroll 8
  for (int i = 1; i < parts; ++i) largest = max(largest, of_parts[i]);
  const int32_t token = token_of(largest);
  return !is_bonus && p.tokens[row * p.drafted + k] == token ? kAccepted : token;
}

template <class T, class Team>
cudaError_t launch_greedy(const VerifyParams& p, cudaStream_t stream) {
  LaunchShape shape{p.rows * (p.drafted + 1) * argmax_parts(p.vocab), kThreads};
  shape.overlaps_previous = Team::kOverlapsLaunches;
  const auto kernel = p.penalties.any() ? rank_parts<PenalisedLogits, Team> : rank_parts<PlainLogits<T>, Team>;
  const cudaError_t status = launch_kernel(kernel, shape, stream, p);
  return status == cudaSuccess ? launch_resolve<Team, greedy_verdict>(p, stream) : status;
}

}  // namespace dflash::DFLASH_ISA
