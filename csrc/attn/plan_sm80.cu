// Makes the plan of a mask in one cooperative launch. Some lanes together make the entry of a tile of rows from the
// bounds of its rows. After a grid barrier the entries are sorted, so that kernels start with the longest work. The
// order does not depend on the number of blocks.
#include <cooperative_groups.h>

#include "attn/kernels.h"
#include "attn/sm80/hulls.h"
#include "common/launch.h"

namespace dflash {
namespace device::sm80 {
namespace {

namespace cg = cooperative_groups;

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

// Makes a tile's entry, and returns it to each of the `lanes` lanes that make it. A lane loads the bounds of kRows rows
// at a time: of four rows by 16-byte accesses, if they are aligned.
template <int kRows>
DFLASH_INLINE TilePlan plan_tile(const PlanParams& p, int lane, int lanes, int tile) {
  const int q_len = static_cast<int>(p.q_len), positions = static_cast<int>(p.positions);
  const int kv_len = static_cast<int>(p.kv_len), per_entry = static_cast<int>(tiles_of(q_len, positions));
  const int entry = tile / per_entry, first = (tile - entry * per_entry) * positions;
  const int rows = min(positions, q_len - first);
  const int64_t first_row = entry * p.mask.batch + first;
  const int32_t *const ctx_lo = p.mask.ctx_lo + first_row, *const ctx_hi = p.mask.ctx_hi + first_row;
  const int32_t *const blk_lo = p.mask.blk_lo + first_row, *const blk_hi = p.mask.blk_hi + first_row;
  const bool by_four =
      kRows == 4 && is_aligned(ctx_lo) && is_aligned(ctx_hi) && is_aligned(blk_lo) && is_aligned(blk_hi);
  const auto four = [](const int32_t* bounds) { return *reinterpret_cast<const int4*>(bounds); };
  Hulls hulls;
  const auto add = [&](int row_ctx_lo, int row_ctx_hi, int row_blk_lo, int row_blk_hi) {
    hulls.add(max(row_ctx_lo, 0), min(row_ctx_hi, kv_len), max(row_blk_lo, 0), min(row_blk_hi, kv_len));
  };
#pragma unroll (kRows == 4 ? 2 : 4)
  for (int i = kRows * lane; i < rows; i += kRows * lanes) {
    if (by_four && i + 4 <= rows) {
      const int4 a = four(ctx_lo + i), b = four(ctx_hi + i), c = four(blk_lo + i), d = four(blk_hi + i);
      add(a.x, b.x, c.x, d.x);
      add(a.y, b.y, c.y, d.y);
      add(a.z, b.z, c.z, d.z);
      add(a.w, b.w, c.w, d.w);
    } else {
      for (int row = i; row < min(i + kRows, rows); ++row) add(ctx_lo[row], ctx_hi[row], blk_lo[row], blk_hi[row]);
    }
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
  const int lane = threadIdx.x % 32;
  const int count = count_tiles(p);
  const int first = blockIdx.x * kFewWarps + threadIdx.x / 32, stride = gridDim.x * kFewWarps;
  auto* const unsorted = reinterpret_cast<TilePlan*>(p.scratch);
  for (int tile = first; tile < count; tile += stride) {
    const TilePlan plan = plan_tile<1>(p, lane, 32, tile);
    if (lane == 0) unsorted[tile] = plan;
  }
  cg::this_grid().sync();
  for (int tile = first; tile < count; tile += stride) {
    const TilePlan plan = unsorted[tile];
    int before = 0;
    for (int other = lane; other < count; other += 32) {
      const int keys = unsorted[other].keys;
      before += keys > plan.keys || (keys == plan.keys && other < tile);
    }
    before = __reduce_add_sync(~0u, before);
    if (lane == 0) reinterpret_cast<TilePlan*>(p.tiles)[before] = plan;
  }
}

constexpr int kThreads = 512, kWarps = kThreads / 32, kRows = 4;

// Returns the size class of a number of keys: how far the upper bits of the number as a float are below those of
// kv_len.
DFLASH_INLINE int size_class(int keys, int kv_len) {
  const auto steps_of = [](int number) { return static_cast<int>(__float_as_uint(__int2float_rz(number)) >> 20); };
  return min(steps_of(kv_len) - steps_of(keys), kSizeClasses - 1);
}

// The places of a block's entries in the sorted plan. All threads of the block call all functions but first_of.
class Places {
 public:
  DFLASH_INLINE void clear() {
    if (threadIdx.x < kSizeClasses) count_[threadIdx.x] = 0;
  }

  // Counts the threads' entries, and returns how many of the block's entries come before the thread's own in its class.
  // Threads without an entry pass class -1.
  DFLASH_INLINE int rank(int of_class) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncwarp();  // all lanes have read what an earlier call left in this warp's row
    for (int i = lane; i < kSizeClasses; i += 32) of_warp_[warp][i] = 0;
    __syncwarp();
    const unsigned alike = __match_any_sync(~0u, of_class);
    const int before = __popc(alike & ((1u << lane) - 1));
    if (of_class >= 0 && before == 0) of_warp_[warp][of_class] = __popc(alike);
    __syncthreads();
    if (threadIdx.x < kSizeClasses) {
      int count = count_[threadIdx.x];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const int there = of_warp_[i][threadIdx.x];
        of_warp_[i][threadIdx.x] = count;
        count += there;
      }
      count_[threadIdx.x] = count;
    }
    __syncthreads();
    return of_class < 0 ? 0 : of_warp_[warp][of_class] + before;
  }

  DFLASH_INLINE void publish(int32_t* counts) const {
    if (threadIdx.x < kSizeClasses) counts[blockIdx.x * kSizeClasses + threadIdx.x] = count_[threadIdx.x];
  }

  // Finds where the block's entries of each class begin, from the counts that all blocks have published.
  DFLASH_INLINE void find(const int32_t* counts) {
    const int of_class = threadIdx.x % kSizeClasses, reader = threadIdx.x / kSizeClasses;
    const int blocks = gridDim.x, block = blockIdx.x;
    int total = 0, before = 0;
#pragma unroll 16
    for (int b = reader; b < blocks; b += kReaders) {
      const int there = counts[b * kSizeClasses + of_class];
      total += there;
      before += b < block ? there : 0;
    }
    total_[reader][of_class] = total;
    before_[reader][of_class] = before;
    __syncthreads();
    if (threadIdx.x < 32) {  // one warp: a prefix sum over the classes
      int begin = 0;
#pragma unroll
      for (int i = threadIdx.x; i < kSizeClasses; i += 32) {
        int sum = 0, before_block = 0;
        for (int r = 0; r < kReaders; ++r) {
          sum += total_[r][i];
          before_block += before_[r][i];
        }
        int up_to = sum;
        for (int distance = 1; distance < 32; distance *= 2) {
          const int other = __shfl_up_sync(~0u, up_to, distance);
          if (threadIdx.x >= distance) up_to += other;
        }
        first_[i] = begin + up_to - sum + before_block;
        begin += __shfl_sync(~0u, up_to, 31);
      }
    }
    __syncthreads();
  }

  // The place of the block's first entry of a class.
  DFLASH_INLINE int first_of(int of_class) const { return first_[of_class]; }

 private:
  static constexpr int kReaders = kThreads / kSizeClasses;  // of one class

  int count_[kSizeClasses], first_[kSizeClasses], of_warp_[kWarps][kSizeClasses];
  int total_[kReaders][kSizeClasses], before_[kReaders][kSizeClasses];
};

// For many tiles: a counting sort by size class. Every block makes and sorts consecutive entries. It counts them by
// class before the grid barrier. After it, the counts of all blocks tell where the block's own entries begin in each
// class. Tiles of one class stay in their order. `lanes` make an entry together.
__global__ void __launch_bounds__(kThreads, 1) block_attn_plan_many_tiles_sm80(const PlanParams p, const int lanes) {
  __shared__ Places places;
  const int count = count_tiles(p), each = (count - 1) / static_cast<int>(gridDim.x) + 1;
  const int begin = min(static_cast<int>(blockIdx.x) * each, count), own = min(each, count - begin);
  const int kv_len = static_cast<int>(p.kv_len);
  auto* const unsorted = reinterpret_cast<TilePlan*>(p.scratch) + begin;
  int32_t* const counts = p.scratch + int64_t(count) * kTilePlanInts;
  const int lane = threadIdx.x % lanes, of_warp = 32 / lanes;  // tiles at a time
  for (int first = threadIdx.x / 32 * of_warp; first < own; first += kWarps * of_warp) {
    const int tile = first + threadIdx.x % 32 / lanes;
    const TilePlan plan = plan_tile<kRows>(p, lane, lanes, begin + min(tile, own - 1));
    if (lane == 0 && tile < own) copy_entry(unsorted + tile, plan);
  }
  places.clear();
  __syncthreads();
  for (int first = 0; first < own; first += kThreads) {
    const int tile = first + threadIdx.x;
    const int rank = places.rank(tile < own ? size_class(unsorted[tile].keys, kv_len) : -1);
    if (tile < own) unsorted[tile].reserved = rank;  // until the entry's place is known
  }
  places.publish(counts);
  cg::this_grid().sync();
  places.find(counts);
  for (int tile = threadIdx.x; tile < own; tile += kThreads) {
    TilePlan plan = read_entry(unsorted + tile);
    const int place = places.first_of(size_class(plan.keys, kv_len)) + plan.reserved;
    plan.reserved = 0;
    copy_entry(reinterpret_cast<TilePlan*>(p.tiles) + place, plan);
  }
}

}  // namespace
}  // namespace device::sm80

const char* plan_sm80(const PlanParams& params, void* stream) {
  using namespace device::sm80;
  const int64_t count = params.entries * tiles_of(params.q_len, params.positions);
  if (count == 0) return nullptr;
  const auto launch = [&](auto* kernel, int64_t blocks, int threads, const auto&... arguments) {
    return checked_launch([&] {
      int resident = 0;
      const auto cuda_stream = static_cast<cudaStream_t>(stream);
      const cudaError_t status = count_resident_blocks(kernel, threads, 0, cuda_stream, &resident);
      if (status != cudaSuccess) return status;
      LaunchShape shape{std::min<int64_t>(blocks, resident), threads};
      shape.is_cooperative = true;
      return launch_kernel(kernel, shape, cuda_stream, params, arguments...);
    });
  };
  if (count <= kFewTiles) {
    return launch(block_attn_plan_few_tiles_sm80, (count + kFewWarps - 1) / kFewWarps, kFewThreads);
  }
  const int64_t rows = std::min(params.positions, params.q_len);
  int lanes = 1;
  while (lanes < 32 && lanes * kRows < rows) lanes *= 2;
  return launch(block_attn_plan_many_tiles_sm80, kMaxPlanBlocks, kThreads, lanes);
}

}  // namespace dflash
