// The blocks that work on one row together: one block, or on Hopper a cluster of them, which see each other's shared
// memory.
#pragma once

#include <cooperative_groups.h>

#include "common/cluster.h"
#include "common/dependent_launch.h"
#include "common/device.h"

namespace dflash::DFLASH_ISA {

constexpr int kLargestTeam = 8;  // the largest clusters that every such GPU has

struct BlockTeam {
  static constexpr int kLargest = 1;
  static constexpr bool kOverlapsLaunches = false;
  static constexpr bool kKeepsRow = false;  // in shared memory, after it has been read
  DFLASH_INLINE static void wait_for_inputs() {}
  DFLASH_INLINE static int rank() { return 0; }
  DFLASH_INLINE static int size() { return 1; }
  DFLASH_INLINE static void arrive_at_start() {}
  DFLASH_INLINE static void wait_for_start() {}
  DFLASH_INLINE static void sync() { __syncthreads(); }
  template <class S>
  DFLASH_INLINE static S* of(S* shared, int) {
    return shared;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct ClusterTeam {
  static constexpr int kLargest = kLargestTeam;
  static constexpr bool kKeepsRow = true;
  static constexpr bool kOverlapsLaunches = true;  // they overlap the kernel before, and the next may overlap them
  // The next kernel may start only when the one before has ended, because it may read early what that one wrote.
  DFLASH_INLINE static void wait_for_inputs() {
    wait_for_previous_kernel();
    launch_dependents();
  }
  DFLASH_INLINE static int rank() { return cluster_rank(); }
  DFLASH_INLINE static int size() { return cluster_size(); }
  // Before a block writes to another's shared memory, both must have started. All threads call both, once.
  DFLASH_INLINE static void arrive_at_start() { cluster_arrive_relaxed(); }
  DFLASH_INLINE static void wait_for_start() { cluster_wait(); }
  DFLASH_INLINE static void sync() { cooperative_groups::this_cluster().sync(); }
  // Returns the same shared memory of another block of the team.
  template <class S>
  DFLASH_INLINE static S* of(S* shared, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
  }
};
#endif

}  // namespace dflash::DFLASH_ISA
