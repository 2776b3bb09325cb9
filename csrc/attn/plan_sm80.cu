// Makes the plan of a mask in one launch. A warp takes a tile of rows, brings the bounds of its rows together and
// keeps the result; when all are there it counts how many tiles have more keys than its own, and that is its tile's
// place in the plan: whoever walks through the plan meets the longest work first.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include "attn/kernels.h"
#include "common/device.h"
#include "common/gpu.h"

namespace dflash {
namespace device {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFar = 1 << 30;

// What the rows' intervals of one kind have in union and in common.
struct Hull {
  int lo = kFar, hi = 0, full_lo = 0, full_hi = kFar;

  DFLASH_INLINE void add(int row_lo, int row_hi) {
    if (row_lo < row_hi) {
      lo = min(lo, row_lo);
      hi = max(hi, row_hi);
      full_lo = max(full_lo, row_lo);
      full_hi = min(full_hi, row_hi);
    } else {
      full_hi = 0;
    }
  }

  DFLASH_INLINE void merge(const cg::thread_block_tile<32>& warp) {
    lo = cg::reduce(warp, lo, cg::less<int>());
    hi = cg::reduce(warp, hi, cg::greater<int>());
    full_lo = cg::reduce(warp, full_lo, cg::greater<int>());
    full_hi = cg::reduce(warp, full_hi, cg::less<int>());
    if (lo >= hi) lo = hi = 0;
    if (full_lo >= full_hi) full_lo = full_hi = 0;
  }
};

DFLASH_INLINE TilePlan plan_tile(const PlanParams& p, const cg::thread_block_tile<32>& warp, int64_t tile) {
  const int64_t per_entry = tiles_of(p.q_len, p.positions);
  const int64_t entry = tile / per_entry, first = tile % per_entry * p.positions;
  const int kv_len = static_cast<int>(p.kv_len);
  Hull ctx, blk;
  for (int64_t row = first + warp.thread_rank(); row < min(first + p.positions, p.q_len); row += 32) {
    const int64_t at = entry * p.mask.batch + row;
    int ctx_lo = max(p.mask.ctx_lo[at], 0), ctx_hi = min(p.mask.ctx_hi[at], kv_len);
    int blk_lo = max(p.mask.blk_lo[at], 0), blk_hi = min(p.mask.blk_hi[at], kv_len);
    if (ctx_lo < ctx_hi && blk_lo < blk_hi && ctx_lo <= blk_hi && blk_lo <= ctx_hi) {
      // They touch: one interval, so that tiles across the seam are full ones too.
      ctx_lo = min(ctx_lo, blk_lo);
      ctx_hi = max(ctx_hi, blk_hi);
      blk_lo = blk_hi = 0;
    }
    ctx.add(ctx_lo, ctx_hi);
    blk.add(blk_lo, blk_hi);
  }
  ctx.merge(warp);
  blk.merge(warp);
  if (blk.lo < blk.hi && (ctx.lo >= ctx.hi || blk.lo < ctx.lo)) {
    const Hull other = ctx;
    ctx = blk;
    blk = other;
  }
  TilePlan plan{};
  plan.entry = static_cast<int>(entry);
  plan.first = static_cast<int>(first);
  const Hull runs[2] = {ctx, blk};
  for (int i = 0; i < 2; ++i) {
    plan.lo[i] = runs[i].lo;
    plan.hi[i] = runs[i].hi;
    plan.full_lo[i] = runs[i].full_lo;
    plan.full_hi[i] = runs[i].full_hi;
  }
  const bool overlap = blk.lo < blk.hi && blk.lo < ctx.hi;
  plan.keys = overlap ? max(ctx.hi, blk.hi) - ctx.lo : ctx.hi - ctx.lo + blk.hi - blk.lo;
  return plan;
}

__global__ void __launch_bounds__(kThreads) make_plan(const PlanParams p) {
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const int64_t count = p.entries * tiles_of(p.q_len, p.positions);
  const int64_t first = int64_t(blockIdx.x) * kWarps + warp.meta_group_rank(), stride = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.counter_count; i += stride * 32) {
    p.counters[i] = 0;
  }
  auto* const unsorted = reinterpret_cast<TilePlan*>(p.unsorted);
  for (int64_t tile = first; tile < count; tile += stride) {
    const TilePlan plan = plan_tile(p, warp, tile);
    if (warp.thread_rank() == 0) unsorted[tile] = plan;
  }
  cg::this_grid().sync();
  for (int64_t tile = first; tile < count; tile += stride) {
    const TilePlan plan = unsorted[tile];
    int before = 0;
    for (int64_t other = warp.thread_rank(); other < count; other += 32) {
      const int keys = unsorted[other].keys;
      before += keys > plan.keys || (keys == plan.keys && other < tile);
    }
    before = cg::reduce(warp, before, cg::plus<int>());
    if (warp.thread_rank() == 0) reinterpret_cast<TilePlan*>(p.tiles)[before] = plan;
  }
}

}  // namespace
}  // namespace device

const char* plan_sm80(const PlanParams& params, void* stream) {
  const int64_t count = params.entries * tiles_of(params.q_len, params.positions);
  if (count == 0) return nullptr;
  int processors = 0;
  cudaError_t status = count_multiprocessors(&processors);
  if (status == cudaSuccess) {
    // All blocks must be resident at once: one a multiprocessor always fits.
    const int64_t blocks = (count + device::kWarps - 1) / device::kWarps;
    PlanParams copy = params;
    void* arguments[] = {&copy};
    status = cudaLaunchCooperativeKernel(device::make_plan, dim3(blocks < processors ? blocks : processors),
                                         dim3(device::kThreads), arguments, 0, static_cast<cudaStream_t>(stream));
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace dflash
