// Makes the plan of a mask in one cooperative launch. Some lanes together make the entry of a tile of rows from the
// bounds of its rows. After a grid barrier the entries are sorted, so that kernels start with the longest work. The
// order does not depend on the number of blocks.
#include "attn/kernels.h"
#include "attn/sm80/hulls.h"
#include "common/launch.h"

namespace dflash {
namespace device::sm80 {
namespace {

// Entries are copied in 16-byte accesses.
DFLASH_INLINE void copy_entry(TilePlan* to, const TilePlan& plan) {
  static_assert(sizeof(TilePlan) == 48);
  const auto* const from = reinterpret_cast<const int*>(&plan);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    reinterpret_cast<int4*>(to)[i] = make_int4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  }
}
DFLASH_INLINE TilePlan read_entry(const TilePlan* at) {
  TilePlan plan;
  auto* const to = reinterpret_cast<int*>(&plan);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int4 part = reinterpret_cast<const int4*>(at)[i];
    to[4 * i] = part.x;
    to[4 * i + 1] = part.y;
    to[4 * i + 2] = part.z;
    to[4 * i + 3] = part.w;
  }
  return plan;
}

DFLASH_INLINE int count_tiles(const PlanParams& p) {
  return static_cast<int>(p.entries * tiles_of(p.q_len, p.positions));
}

// Makes a tile's entry, and returns it to all lanes.
template <class Lanes>
DFLASH_INLINE TilePlan plan_tile(const PlanParams& p, const Lanes& lanes, int tile) {
  const int q_len = static_cast<int>(p.q_len), positions = static_cast<int>(p.positions);
  const int kv_len = static_cast<int>(p.kv_len), per_entry = static_cast<int>(tiles_of(q_len, positions));
  const int entry = tile / per_entry, first = (tile - entry * per_entry) * positions;
  const int rows = min(positions, q_len - first);
  const int64_t first_row = entry * p.mask.batch + first;
  Hulls hulls;
#pragma unroll 4
  for (int i = lanes.thread_rank(); i < rows; i += lanes.size()) {
    const int64_t at = first_row + i;
    const int4 bounds{p.mask.ctx_lo[at], p.mask.ctx_hi[at], p.mask.blk_lo[at], p.mask.blk_hi[at]};
    hulls.add(max(bounds.x, 0), min(bounds.y, kv_len), max(bounds.z, 0), min(bounds.w, kv_len));
  }
  hulls.merge(lanes);
  Hull ctx = hulls.ctx, blk = hulls.blk;
  if (blk.lo < blk.hi && (ctx.lo >= ctx.hi || blk.lo < ctx.lo)) {
    const Hull other = ctx;
    ctx = blk;
    blk = other;
  }
  TilePlan plan{};
  plan.entry = entry;
  plan.first = first;
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

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;

// For few tiles: a warp makes a tile's entry, and after the grid barrier it counts how many tiles come before its own.
__global__ void __launch_bounds__(kFewThreads) block_attn_plan_few_tiles_sm80(const PlanParams p) {
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const int count = count_tiles(p);
  const int first = blockIdx.x * kFewWarps + warp.meta_group_rank(), stride = gridDim.x * kFewWarps;
  auto* const unsorted = reinterpret_cast<TilePlan*>(p.scratch);
  for (int tile = first; tile < count; tile += stride) {
    const TilePlan plan = plan_tile(p, warp, tile);
    if (warp.thread_rank() == 0) unsorted[tile] = plan;
  }
  cg::this_grid().sync();
  for (int tile = first; tile < count; tile += stride) {
    const TilePlan plan = unsorted[tile];
    int before = 0;
    for (int other = warp.thread_rank(); other < count; other += 32) {
      const int keys = unsorted[other].keys;
      before += keys > plan.keys || (keys == plan.keys && other < tile);
    }
    before = cg::reduce(warp, before, cg::plus<int>());
    if (warp.thread_rank() == 0) reinterpret_cast<TilePlan*>(p.tiles)[before] = plan;
  }
}

constexpr int kThreads = 1024, kLanes = 8;  // lanes of a tile

// Returns the size class of a number of keys: how far the upper bits of the number as a float are below those of
// kv_len. Numbers below 2^-16 of kv_len share the last class.
DFLASH_INLINE int size_class(int keys, int kv_len) {
  const auto steps_of = [](int number) { return static_cast<int>(__float_as_uint(__int2float_rz(number)) >> 20); };
  return min(steps_of(kv_len) - steps_of(keys), kSizeClasses - 1);
}

// The places of a block's entries in the sorted plan.
class Places {
 public:
  // clear, count and publish count the block's own tiles by class. All threads call all functions but count.
  DFLASH_INLINE void clear() {
    for (int i = threadIdx.x; i < kSizeClasses; i += kThreads) count_[i] = 0;
    __syncthreads();
  }
  DFLASH_INLINE void count(int of_class) { atomicAdd(&count_[of_class], 1); }
  DFLASH_INLINE void publish(int32_t* counts) const {
    __syncthreads();
    for (int i = threadIdx.x; i < kSizeClasses; i += kThreads) counts[blockIdx.x * kSizeClasses + i] = count_[i];
  }

  // Computes where the block's entries of each class begin, from the counts that all blocks have published.
  DFLASH_INLINE void find(const int32_t* counts) {
    clear();
    for (int i = threadIdx.x; i < kSizeClasses; i += kThreads) next_[i] = 0;
    __syncthreads();
    constexpr int kReaders = kThreads / kSizeClasses;  // of one class
    const int of_class = threadIdx.x % kSizeClasses, blocks = gridDim.x, block = blockIdx.x;
    int total = 0, before = 0;
#pragma unroll 16
    for (int b = threadIdx.x / kSizeClasses; b < blocks; b += kReaders) {
      const int there = counts[b * kSizeClasses + of_class];
      total += there;
      before += b < block ? there : 0;
    }
    atomicAdd(&count_[of_class], total);
    atomicAdd(&next_[of_class], before);
    __syncthreads();
    // A prefix sum over the classes, with one thread for each class.
    const int lane = threadIdx.x % 32, scan_warp = threadIdx.x / 32;
    int own = 0, start = 0;
    if (threadIdx.x < kSizeClasses) {
      start = own = count_[threadIdx.x];
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, start, distance);
        if (lane >= distance) start += other;
      }
      if (lane == 31) warp_total_[scan_warp] = start;
    }
    __syncthreads();
    if (threadIdx.x >= kSizeClasses) return;
    for (int i = 0; i < scan_warp; ++i) start += warp_total_[i];
    next_[threadIdx.x] += start - own;
  }

  // Returns the places of the first `count` threads' entries, warp by warp. The other threads pass class -1.
  DFLASH_INLINE int take(int of_class, int count) {
    int place = 0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned alike = __match_any_sync(~0u, of_class);
    for (int turn = 0; turn * 32 < count; ++turn) {
      __syncthreads();
      if (turn != warp || of_class < 0) continue;
      place = next_[of_class] + __popc(alike & ((1u << lane) - 1));
      __syncwarp(alike);  // all have read before one writes
      if (__ffs(alike) - 1 == lane) next_[of_class] += __popc(alike);
    }
    return place;
  }

 private:
  int count_[kSizeClasses], next_[kSizeClasses], warp_total_[kSizeClasses / 32];
};

// For many tiles: a counting sort by size class. Every block makes and sorts consecutive entries. It counts them by
// class before the grid barrier. After it, the counts of all blocks tell where the block's own entries begin in each
// class. Tiles of one class stay in their order.
__global__ void __launch_bounds__(kThreads, 1) block_attn_plan_many_tiles_sm80(const PlanParams p) {
  __shared__ Places places;
  const auto lanes = cg::tiled_partition<kLanes>(cg::this_thread_block());
  const int count = count_tiles(p), each = (count - 1) / static_cast<int>(gridDim.x) + 1;
  const int begin = min(static_cast<int>(blockIdx.x) * each, count), end = min(begin + each, count);
  const int kv_len = static_cast<int>(p.kv_len);
  auto* const unsorted = reinterpret_cast<TilePlan*>(p.scratch);
  int32_t* const counts = p.scratch + int64_t(count) * kTilePlanInts;
  places.clear();
  for (int tile = begin + lanes.meta_group_rank(); tile < end; tile += kThreads / kLanes) {
    const TilePlan plan = plan_tile(p, lanes, tile);
    if (lanes.thread_rank() == 0) {
      copy_entry(unsorted + tile, plan);
      places.count(size_class(plan.keys, kv_len));
    }
  }
  places.publish(counts);
  cg::this_grid().sync();
  places.find(counts);
  for (int first = begin; first < end; first += kThreads) {
    const int present = min(end - first, kThreads), own = threadIdx.x;
    TilePlan plan;
    if (own < present) plan = read_entry(unsorted + first + own);
    const int place = places.take(own < present ? size_class(plan.keys, kv_len) : -1, present);
    if (own < present) copy_entry(reinterpret_cast<TilePlan*>(p.tiles) + place, plan);
  }
}

}  // namespace
}  // namespace device::sm80

const char* plan_sm80(const PlanParams& params, void* stream) {
  const int64_t count = params.entries * tiles_of(params.q_len, params.positions);
  if (count == 0) return nullptr;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool few = count <= kFewTiles;
  const auto kernel =
      few ? device::sm80::block_attn_plan_few_tiles_sm80 : device::sm80::block_attn_plan_many_tiles_sm80;
  const int threads = few ? device::sm80::kFewThreads : device::sm80::kThreads;
  const int64_t blocks = few ? (count + device::sm80::kFewWarps - 1) / device::sm80::kFewWarps : kMaxPlanBlocks;
  return checked_launch([&] {
    int resident = 0;
    const cudaError_t status = count_resident_blocks(kernel, threads, 0, cuda_stream, &resident);
    if (status != cudaSuccess) return status;
    LaunchShape shape{std::min<int64_t>(blocks, resident), threads};
    shape.is_cooperative = true;
    return launch_kernel(kernel, shape, cuda_stream, params);
  });
}

}  // namespace dflash
