// How the blocks of the Hopper backward share its work: two launches between backward_prepare and the main kernel.
//
// The work on a tile of keys is the tiles of rows that see it, in all head groups of its key head, and a constant for
// beginning and ending it. All blocks get equal shares of the work of a section. A share may begin and end within a
// tile of keys; such a tile is split, and its float32 sums are set to zero here.
#include "attn/kernels.h"
#include "attn/plan.h"
#include "common/device.h"
#include "common/launch.h"

namespace dflash {
namespace device::sm90 {
namespace {

constexpr int kCountThreads = 1024, kDealThreads = 256;

// Counts how many tiles of rows see the tiles of keys before each. A block takes one entry of the mask.
__global__ void __launch_bounds__(kCountThreads)
    block_attn_backward_count_sm90(const __grid_constant__ BackwardParams p) {
  const int key_tiles = static_cast<int>(p.key_tiles), keys = static_cast<int>(p.tile_keys);
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < p.sections * p.blocks; i += blockDim.x) p.first_items[i] = -1;
  }
  int32_t* const seen = p.seen + int64_t(blockIdx.x) * (key_tiles + 1);
  for (int i = threadIdx.x; i <= key_tiles; i += blockDim.x) seen[i] = 0;
  __syncthreads();
  const auto add = [&](int first, int last) {
    atomicAdd(&seen[first], 1);
    atomicAdd(&seen[last + 1], -1);
  };
  for (int64_t i = threadIdx.x; i < p.row_tiles; i += blockDim.x) {
    const RowTile tile = p.tiles[blockIdx.x * p.row_tiles + i];
    const bool has[2] = {tile.lo[0] < tile.hi[0], tile.lo[1] < tile.hi[1]};
    const int first[2] = {tile.lo[0] / keys, tile.lo[1] / keys};
    const int last[2] = {(tile.hi[0] - 1) / keys, (tile.hi[1] - 1) / keys};
    if (has[0] && has[1] && first[0] <= last[1] && first[1] <= last[0]) {
      add(min(first[0], first[1]), max(last[0], last[1]));
    } else {
      if (has[0]) add(first[0], last[0]);
      if (has[1]) add(first[1], last[1]);
    }
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const auto scan = [&](int x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, x, step);
      if (static_cast<int>(threadIdx.x) >= step) x += other;
    }
    return x;
  };
  int count_before = 0, sum_before = 0;  // of the tiles before these 32: the count of the last, and the sum of all
  for (int base = 0; base <= key_tiles; base += 32) {
    const int i = base + static_cast<int>(threadIdx.x);
    const int count = scan(i < key_tiles ? seen[i] : 0) + count_before;
    const int sum = scan(i < key_tiles ? count : 0) + sum_before;
    if (i <= key_tiles) seen[i] = i < key_tiles ? sum - count : sum;
    count_before = __shfl_sync(~0u, count, 31);
    sum_before = __shfl_sync(~0u, sum, 31);
  }
}

// Deals the tiles of keys to the blocks of the main kernel. Here a block takes one tile, and finds out who works on it.
__global__ void __launch_bounds__(kDealThreads)
    block_attn_backward_deal_sm90(const __grid_constant__ BackwardParams p) {
  const int64_t key_tiles = p.key_tiles, groups = p.heads / p.kv_heads / p.fold;
  const int64_t tile = blockIdx.x, head = tile / key_tiles, key_tile = tile % key_tiles;
  const int64_t section = head / p.section_heads;
  const auto entry_of = [&](int64_t head) { return p.entries == 1 ? 0 : head / p.kv_heads; };
  const int32_t* const seen = p.seen + entry_of(head) * (key_tiles + 1);
  // A tile of keys weighs as many tiles of rows as see it, in all head groups, and its overhead.
  const auto before = [&](const int32_t* seen, int64_t key_tile) {
    return seen[key_tile] * groups + key_tile * kHopperBackwardOverhead;
  };
  int64_t total = 0, begin = before(seen, key_tile);  // of the section
  const int64_t first_head = section * p.section_heads, heads = p.batch * p.kv_heads;
  for (int64_t other = first_head; other < min(first_head + p.section_heads, heads); ++other) {
    if (other == head) begin += total;
    total += before(p.seen + entry_of(other) * (key_tiles + 1), key_tiles);
  }
  const int64_t weight = before(seen, key_tile + 1) - before(seen, key_tile), end = begin + weight;
  const auto share = [&](int64_t block) { return total * block / p.blocks; };
  int64_t block = begin * p.blocks / total;
  while (share(block + 1) <= begin) ++block;
  const bool is_whole = share(block + 1) >= end;
  if (!is_whole) {
    auto* const sums = reinterpret_cast<float4*>(p.grad_key_sums + tile * 2 * p.tile_keys * p.tile_dim);
    for (int i = threadIdx.x; i < 2 * p.tile_keys * p.tile_dim / 4; i += blockDim.x) sums[i] = make_float4(0, 0, 0, 0);
  }
  if (threadIdx.x > 0) return;
  p.is_split[tile] = !is_whole;
  BackwardItem item{};
  item.entry = static_cast<int>(entry_of(head));
  item.batch = static_cast<int>(head / p.kv_heads);
  item.kv_head = static_cast<int>(head % p.kv_heads);
  item.key_tile = static_cast<int>(key_tile);
  item.per_group = seen[key_tile + 1] - seen[key_tile];
  item.is_whole = is_whole;
  for (; block < p.blocks && share(block) < end; ++block) {
    const int64_t from = max(begin, share(block)) - begin, to = min(end, share(block + 1)) - begin;
    if (from >= to) continue;
    item.begin = static_cast<int>(from * item.per_group * groups / weight);
    item.end = static_cast<int>(to * item.per_group * groups / weight);
    item.is_last = share(block + 1) <= end;
    // A block and a tile meet at most once in a section, and both ascend. So all places differ, and the places of a
    // block follow one another.
    const int64_t place = tile + section * p.blocks + block;
    p.items[place] = item;
    if (share(block) >= begin) p.first_items[section * p.blocks + block] = static_cast<int>(place);
  }
}

}  // namespace
}  // namespace device::sm90

const char* backward_deal_sm90(const BackwardParams& p, void* stream) {
  using namespace device::sm90;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return checked_launch([&] {
    const cudaError_t status =
        launch_kernel(block_attn_backward_count_sm90, {p.entries, kCountThreads}, cuda_stream, p);
    if (status != cudaSuccess) return status;
    const int64_t key_tiles = p.batch * p.kv_heads * p.key_tiles;
    return launch_kernel(block_attn_backward_deal_sm90, {key_tiles, kDealThreads}, cuda_stream, p);
  });
}

}  // namespace dflash
