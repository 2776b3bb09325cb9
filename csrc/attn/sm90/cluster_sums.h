// How the blocks of a cluster add up the sums of an item.
//
// Every block holds sums of the same rows over its own keys, in the registers of its consumers. Each block combines
// some neighbouring fragments of eight columns: the other blocks send it their fragments, and the statistics of all
// rows. The limit is the network between multiprocessors (20 bytes a clock out of each), and the copy engine takes 50
// clocks to start a copy. Therefore sums travel as the upper 24 bits of floats, and in one copy for each other block.
// Where there is much to send there are a few copies, so that the first fragments are combined while the others are in
// flight.
//
// What arrives overwrites the queries and keys. It may be sent once no block of the cluster reads queries and keys any
// more. All consumers say so at a cluster barrier before their last products with values, which hide the wait. The
// producer's warp sends, so that consumers go on. Its code is small because it runs once: fetching instructions takes
// longer than executing them.
#pragma once

#include "attn/softmax.h"
#include "common/cluster.h"
#include "common/mbarrier.h"
#include "common/named_barrier.h"
#include "common/tma.h"

namespace dflash::DFLASH_ISA::sm90 {

// kPieceSlots is how many fragments one copy sends, an even number. The barriers are named barriers of the consumers
// and the producer's warp.
template <int kRows, int kFragments, int kMaxRanks, int kPieceSlots, int kStatsBarrier, int kSumsBarrier>
struct ClusterSums {
  static constexpr int kWarps = kRows / 16, kThreads = kWarps * 32;
  static constexpr int kStatsBytes = kRows * sizeof(float2);
  // A fragment is the upper 16 bits of its sums, [kRows][8], and then the 8 bits below, [kRows][8].
  static constexpr int kUpperBytes = kRows * 16, kFragmentBytes = kRows * 24;
  static constexpr int kMaxPieces = (kFragments / 2 + kPieceSlots - 1) / kPieceSlots;

  // The memory holds what others send, [ranks] statistics (the block's own stay empty) and [ranks - 1][slots]
  // fragments, and then the block's own [kFragments].
  static constexpr int slots_of(int ranks) { return (kFragments + ranks - 1) / ranks; }
  static constexpr int received_bytes(int ranks) {
    return ranks * kStatsBytes + (ranks - 1) * slots_of(ranks) * kFragmentBytes;
  }
  static constexpr bool fit(int free_early, int all) {
    for (int ranks = 2; ranks <= kMaxRanks; ++ranks) {
      const int received = received_bytes(ranks);
      if (received > free_early || received + kFragments * kFragmentBytes > all) return false;
    }
    return true;
  }

  // This lies in shared memory as well.
  struct State {
    Mbarrier full[1 + kMaxPieces];    // of statistics, then of pieces
    alignas(16) float2 stats[kRows];  // the rows' largest scores and sums of exponentials

    DFLASH_INLINE void init() {
#pragma unroll
      for (Mbarrier& barrier : full) barrier.init();
    }
  };

  unsigned char* memory;
  State& state;
  int rank, ranks;
  int slots = slots_of(ranks);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // How many fragments a block combines, and where a piece of them ends.
  DFLASH_INLINE int slots_for(int to) const { return min(max(kFragments - to * slots, 0), slots); }
  static DFLASH_INLINE int end_of(int piece, int slots) { return min((piece + 1) * kPieceSlots, slots); }

  DFLASH_INLINE unsigned char* stats_of(int from) const { return memory + from * kStatsBytes; }
  DFLASH_INLINE unsigned char* received(int from, int to) const {
    return memory + ranks * kStatsBytes + (from - (from > to)) * slots * kFragmentBytes;
  }
  DFLASH_INLINE unsigned char* own() const { return memory + received_bytes(ranks); }

  // The producer's warp calls this after its last load.
  DFLASH_INLINE void send_all() const {
    if (lane == 0) {
      const int own_slots = slots_for(rank);
      state.full[0].arrive_and_expect_tx((ranks - 1) * kStatsBytes);
#pragma unroll 1
      for (int piece = 0; piece * kPieceSlots < own_slots; ++piece) {
        const int fragments = end_of(piece, own_slots) - piece * kPieceSlots;
        state.full[1 + piece].arrive_and_expect_tx((ranks - 1) * fragments * kFragmentBytes);
      }
    }
    __syncwarp();
    cluster_arrive_relaxed();
    // Each lane sends to one other block. Turn -1 sends statistics, with the same instructions as the pieces.
    const int next = rank + 1 + lane, to = next < ranks ? next : next - ranks;
#pragma unroll 1
    for (int piece = -1; piece * kPieceSlots < slots; ++piece) {
      if (piece < 1) named_barrier_sync(piece < 0 ? kStatsBarrier : kSumsBarrier, kThreads + 32);
      if (piece < 0) cluster_wait();
      const int begin = piece * kPieceSlots * kFragmentBytes, end = end_of(piece, slots_for(to)) * kFragmentBytes;
      const unsigned char* const from = piece < 0 ? reinterpret_cast<const unsigned char*>(state.stats)
                                                  : own() + to * slots * kFragmentBytes + begin;
      unsigned char* const at = piece < 0 ? stats_of(rank) : received(rank, to) + begin;
      const int bytes = piece < 0 ? kStatsBytes : end - begin;
      if (lane + 1 < ranks && bytes > 0) {
        bulk_send(map_to_rank(shared_address(at), to), shared_address(from), bytes,
             map_to_rank(shared_address(&state.full[1 + piece]), to));
      }
      __syncwarp();
    }
  }

  // Consumers call this after their last product of queries and keys, with the statistics of the thread's two rows.
  DFLASH_INLINE void announce(const float (&largest)[2], const float (&sum)[2]) const {
    cluster_arrive_relaxed();
    const float totals[2] = {total_of(sum[0]), total_of(sum[1])};
    if (lane % 4 == 0) {
      for (int r = 0; r < 2; ++r) state.stats[warp * 16 + lane / 4 + 8 * r] = make_float2(largest[r], totals[r]);
    }
    fence_proxy_async();
    named_barrier_arrive(kStatsBarrier, kThreads + 32);
  }

  // Consumers call this when all of them have read the last values.
  DFLASH_INLINE void lay_out(const float (&out)[kFragments * 4]) const {
    const int row = warp * 16 + lane / 4;
    unsigned char* const upper = own() + row * 16 + lane % 4 * 4;
    unsigned char* const lower = own() + kUpperBytes + row * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      const uint32_t x = __float_as_uint(out[2 * i]), y = __float_as_uint(out[2 * i + 1]);
      const int fragment = i / 2 * kFragmentBytes, below = i % 2 * 8;
      *reinterpret_cast<uint32_t*>(upper + fragment + below * 16) = __byte_perm(x, y, 0x7632);
      *reinterpret_cast<uint16_t*>(lower + fragment + below * 8) = __byte_perm(x, y, 0x51);
    }
    fence_proxy_async();
    __syncwarp();
    named_barrier_arrive(kSumsBarrier, kThreads + 32);
    cluster_wait();
  }

  // Combines the block's fragments, and calls store(fragment, x) for each with the thread's row, which is
  // threadIdx.x / 32 * 16 + threadIdx.x % 16. Scores times `factor` are the exponents.
  template <class Store>
  DFLASH_INLINE void add_up(float factor, Store store) const {
    const int own_slots = slots_for(rank), row = warp * 16 + lane % 16;
    float weights[kMaxRanks], sums[kMaxRanks], base = -kInfinity, sum = 0;
    state.full[0].wait(0);
#pragma unroll
    for (int from = 0; from < kMaxRanks; ++from) {
      const void* const stats = from == rank ? reinterpret_cast<unsigned char*>(state.stats) : stats_of(from);
      float2 of_row = make_float2(-kInfinity, 0);
      if (from < ranks) of_row = reinterpret_cast<const float2*>(stats)[row];
      weights[from] = __fmul_rn(of_row.x, factor);
      sums[from] = of_row.y;
      base = fmaxf(base, weights[from]);
    }
    if (base == -kInfinity) base = 0;
#pragma unroll
    for (int from = 0; from < kMaxRanks; ++from) {
      weights[from] = exp2_of(weights[from] - base);
      sum = fmaf(weights[from], sums[from], sum);
    }
    const float inverse = inverse_of(sum);
#pragma unroll
    for (float& weight : weights) weight *= inverse;

#pragma unroll 1
    for (int i = 0; i < own_slots; i += 2) {
      if (i % kPieceSlots == 0) {
        state.full[1 + i / kPieceSlots].wait(0);
        if (i + kPieceSlots >= own_slots) cluster_arrive_relaxed();
      }
      const int slot = i + lane / 16, at = min(slot, own_slots - 1) * kFragmentBytes;
      uint4 upper[kMaxRanks];
      uint2 lower[kMaxRanks];
#pragma unroll
      for (int from = 0; from < kMaxRanks; ++from) {
        const unsigned char* const part =
            (from == rank ? own() + rank * slots * kFragmentBytes : received(from, rank)) + at;
        upper[from] = {};
        lower[from] = {};
        if (from < ranks) {
          upper[from] = reinterpret_cast<const uint4*>(part)[row];
          lower[from] = reinterpret_cast<const uint2*>(part + kUpperBytes)[row];
        }
      }
      float x[8] = {};
#pragma unroll
      for (int from = 0; from < kMaxRanks; ++from) {
        const uint32_t uppers[4] = {upper[from].x, upper[from].y, upper[from].z, upper[from].w};
        const uint32_t lowers[2] = {lower[from].x, lower[from].y};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          // The lowest byte, which was not sent, repeats the byte above it.
          const int select = (c % 2 ? 0x3200 : 0x1000) + 0x11 * (4 + c % 4);
          const uint32_t bytes = __byte_perm(uppers[c / 2], lowers[c / 4], select);
          x[c] = fmaf(weights[from], __uint_as_float(bytes), x[c]);
        }
      }
      if (slot < own_slots) store(rank * slots + slot, x);
    }
    if (own_slots == 0) cluster_arrive_relaxed();
    // A block may exit only after everything that it sent has arrived.
    cluster_wait();
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
