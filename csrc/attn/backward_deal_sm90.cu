// How the blocks of the Hopper backward share its work and, for deterministic calls, in which order they add to the
// sums of dQ: two launches between backward_prepare and the main kernel.
//
// A share (sm90/backward_shares.h) may begin and end within a tile of keys, which is then split.
//
// A tile of rows gets one addition from each tile of keys that it sees. They take turns in the order in which blocks
// would come to them if every unit of work took equally long: by the place in a block's share, and then by block. So
// waits are short. There are no deadlocks: a unit waits only for units with an earlier place, and a block comes to its
// units in the order of their places.
#include "attn/kernels.h"
#include "attn/sm90/backward_shares.h"
#include "attn/tile_sight.h"
#include "common/dependent_launch.h"
#include "common/launch.h"

namespace dflash {
namespace device::sm90 {
namespace {

constexpr int kCountThreads = 1024, kDealThreads = 128;

// Counts how many tiles of rows see the tiles of keys before each, for one entry of the mask.
DFLASH_INLINE void count_rows(const BackwardParams& p, int64_t entry) {
  const int key_tiles = static_cast<int>(p.key_tiles), keys = static_cast<int>(p.tile_keys);
  int32_t* const seen = p.seen + entry * (key_tiles + 1);
  for (int i = threadIdx.x; i <= key_tiles; i += blockDim.x) seen[i] = 0;
  __syncthreads();
  const auto add = [&](int first, int last) {
    atomicAdd(&seen[first], 1);
    atomicAdd(&seen[last + 1], -1);
  };
  for (int64_t i = threadIdx.x; i < p.row_tiles; i += blockDim.x) {
    const RowTile tile = p.tiles[entry * p.row_tiles + i];
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

// Writes which tiles of rows see a tile of keys of one entry of the mask. A warp calls this.
DFLASH_INLINE void note_rows(const BackwardParams& p, int64_t tile) {
  const int64_t entry = tile / p.key_tiles, words = tiles_of(p.row_tiles, 32);
  const int keys = static_cast<int>(p.tile_keys), first = static_cast<int>(tile % p.key_tiles) * keys;
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int64_t word = 0; word < words; ++word) {
    const int64_t row_tile = word * 32 + lane;
    TileSight sight;
    if (row_tile < p.row_tiles) sight = TileSight(p.tiles[entry * p.row_tiles + row_tile], first, first + keys);
    const uint32_t bits = __ballot_sync(~0u, sight.is_seen);
    if (lane == 0) p.seen_by[tile * words + word] = {bits, before};
    before += __popc(bits);
  }
}

// The first blocks take an entry of the mask each. In deterministic calls the warps of others take a tile of keys each.
__global__ void __launch_bounds__(kCountThreads)
    block_attn_backward_count_sm90(const __grid_constant__ BackwardParams p) {
  launch_dependents();
  wait_for_previous_kernel();
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < p.sections * p.blocks; i += blockDim.x) p.first_items[i] = -1;
    const auto clear = [](int32_t* counters, int64_t count) {
      if (counters == nullptr) return;
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) counters[i] = 0;
    };
    clear(p.rows_added, p.batch * (p.heads / p.fold) * p.row_tiles * hopper_backward_cluster(p.head_dim));
    clear(p.sections_added, p.sections);
  }
  if (blockIdx.x < p.entries) {
    count_rows(p, blockIdx.x);
  } else {
    const int64_t tile = (blockIdx.x - p.entries) * (kCountThreads / 32) + threadIdx.x / 32;
    if (tile < p.entries * p.key_tiles) note_rows(p, tile);
  }
}

// Writes the turns at a tile of rows of one head group. A block calls this. `places` has room for all tiles of keys.
DFLASH_INLINE void give_turns(const BackwardParams& p, int64_t index, uint64_t* places) {
  constexpr uint64_t kUnseen = ~uint64_t(0);
  const int64_t groups = p.heads / p.fold, groups_per_head = groups / p.kv_heads, words = tiles_of(p.row_tiles, 32);
  const int64_t tile = index % p.row_tiles, group = index / p.row_tiles % groups, batch = index / p.row_tiles / groups;
  const int64_t entry = p.entries == 1 ? 0 : batch;
  const int key_tiles = static_cast<int>(p.key_tiles);
  const HeadWork work(p, batch * p.kv_heads + group / groups_per_head);
  for (int i = threadIdx.x; i < key_tiles; i += kDealThreads) {
    const SeenBy seen = p.seen_by[(entry * key_tiles + i) * words + tile / 32];
    const uint32_t bit = 1u << tile % 32;
    places[i] = kUnseen;
    if ((seen.bits & bit) == 0) continue;
    const int64_t unit = group % groups_per_head * work.per_group(i) + seen.before + __popc(seen.bits & (bit - 1));
    // The unit ends at this place of the tile's work, rounded up; it belongs to the block that holds the place before.
    const int64_t units = work.units(i), end = ((unit + 1) * work.weight(i) + units - 1) / units;
    const int64_t place = work.begin(i) + end - 1, block = work.block_at(place);
    places[i] = (place - work.share(block)) * p.blocks + block;
  }
  __syncthreads();
  uint16_t* const turns = p.turns + index * key_tiles;
  for (int i = threadIdx.x; i < key_tiles; i += kDealThreads) {
    const uint64_t place = places[i];
    if (place == kUnseen) continue;
    int turn = 0;
    for (int other = 0; other < key_tiles; ++other) turn += places[other] < place;
    turns[i] = static_cast<uint16_t>(turn);
  }
}

// Deals a tile of keys to the blocks of the main kernel. A thread calls this.
DFLASH_INLINE void deal_keys(const BackwardParams& p, int64_t tile) {
  const int64_t head = tile / p.key_tiles, key_tile = tile % p.key_tiles;
  const int64_t section = head / p.section_heads;
  const HeadWork work(p, head);
  const int64_t begin = work.begin(key_tile), weight = work.weight(key_tile), end = begin + weight;
  const int64_t units = work.units(key_tile), first_block = work.block_at(begin);
  if (p.keys_added != nullptr) reinterpret_cast<int4*>(p.keys_added)[tile] = make_int4(0, 0, 0, 0);
  BackwardItem item{};
  item.entry = static_cast<int>(p.entries == 1 ? 0 : head / p.kv_heads);
  item.batch = static_cast<int>(head / p.kv_heads);
  item.kv_head = static_cast<int>(head % p.kv_heads);
  item.key_tile = static_cast<int>(key_tile);
  item.per_group = work.per_group(key_tile);
  const int64_t last_block = work.block_at(end - 1);
  int parts = 0;
  for (int64_t block = first_block; block <= last_block; ++block) parts += work.share(block) < work.share(block + 1);
  for (int64_t block = first_block, part = 0; block <= last_block; ++block) {
    const int64_t share_begin = work.share(block), share_end = work.share(block + 1);
    if (share_begin == share_end) continue;
    const int64_t from = max(begin, share_begin) - begin, to = min(end, share_end) - begin;
    item.begin = static_cast<int>(from * units / weight);
    item.end = static_cast<int>(to * units / weight);
    item.is_last = share_end <= end;
    // The block that ends the tile of keys is done first, soon after the begin of its share. The others take turns in
    // order, at the end of their shares.
    item.turn = static_cast<int16_t>(++part == parts ? 0 : part);
    item.part = parts == 1                ? BackwardPart::kWhole
                : item.turn == 0          ? BackwardPart::kFirst
                : item.turn == parts - 1  ? BackwardPart::kFinal
                                          : BackwardPart::kMiddle;
    if (item.part == BackwardPart::kMiddle && !p.is_deterministic) item.turn = 1;
    // A block and a tile meet at most once in a section, and both ascend. So all places differ, and the places of a
    // block follow one another.
    const int64_t place = tile + section * p.blocks + block;
    p.items[place] = item;
    if (share_begin >= begin) p.first_items[section * p.blocks + block] = static_cast<int>(place);
  }
}

// Sets the sums of a tile of keys to zero, if the tile is split. A block calls this.
DFLASH_INLINE void clear_sums(const BackwardParams& p, int64_t tile) {
  const HeadWork work(p, tile / p.key_tiles);
  const int64_t begin = work.begin(tile % p.key_tiles), end = begin + work.weight(tile % p.key_tiles);
  const bool is_split = work.block_at(begin) != work.block_at(end - 1);
  if (threadIdx.x == 0) p.is_split[tile] = is_split;
  if (!is_split) return;
  const int64_t count = 2 * p.tile_keys * p.tile_dim / 4;
  auto* const sums = reinterpret_cast<float4*>(p.grad_key_sums) + tile * count;
  for (int i = threadIdx.x; i < count; i += kDealThreads) sums[i] = make_float4(0, 0, 0, 0);
}

// In deterministic calls the first blocks take a tile of rows each. The threads of the next ones take a tile of keys
// each. If sums begin as zeros, there is one more block for each tile of keys.
__global__ void __launch_bounds__(kDealThreads)
    block_attn_backward_deal_sm90(const __grid_constant__ BackwardParams p, const int64_t row_tiles) {
  extern __shared__ uint64_t places[];
  launch_dependents();
  wait_for_previous_kernel();
  if (blockIdx.x < row_tiles) {
    give_turns(p, blockIdx.x, places);
  } else {
    const int64_t key_tiles = p.batch * p.kv_heads * p.key_tiles, deals = tiles_of(key_tiles, kDealThreads);
    const int64_t block = blockIdx.x - row_tiles, tile = block * kDealThreads + threadIdx.x;
    if (tile < key_tiles) deal_keys(p, tile);
    if (block >= deals) clear_sums(p, block - deals);
  }
}

}  // namespace
}  // namespace device::sm90

const char* backward_deal_sm90(const BackwardParams& p, void* stream) {
  using namespace device::sm90;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return checked_launch([&] {
    const int64_t notes = p.is_deterministic ? tiles_of(p.entries * p.key_tiles, kCountThreads / 32) : 0;
    LaunchShape shape{p.entries + notes, kCountThreads};
    shape.overlaps_previous = true;
    const cudaError_t status = launch_kernel(block_attn_backward_count_sm90, shape, cuda_stream, p);
    if (status != cudaSuccess) return status;
    const int64_t row_tiles = p.is_deterministic ? p.batch * (p.heads / p.fold) * p.row_tiles : 0;
    const int64_t key_tiles = p.batch * p.kv_heads * p.key_tiles;
    const int64_t blocks = row_tiles + tiles_of(key_tiles, kDealThreads) + (p.adds_to_zeros ? key_tiles : 0);
    // The compiler reads places by pairs.
    const int places_bytes = static_cast<int>(tiles_of(p.key_tiles, 2) * 2 * sizeof(uint64_t));
    shape = {blocks, kDealThreads, p.is_deterministic ? places_bytes : 0};
    shape.overlaps_previous = true;
    return launch_kernel(block_attn_backward_deal_sm90, shape, cuda_stream, p, row_tiles);
  });
}

}  // namespace dflash
