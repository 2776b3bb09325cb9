// The blocks that work on one row together: one block, or on Hopper a cluster of them, which see each other's shared
// memory.
#pragma once

#include <cooperative_groups.h>

#include "common/device.h"

namespace dflash::DFLASH_ISA {

struct BlockTeam {
  DFLASH_INLINE static int rank() { return 0; }
  DFLASH_INLINE static int size() { return 1; }
  DFLASH_INLINE static void sync() { __syncthreads(); }
  template <class S>
  DFLASH_INLINE static const S* of(const S* shared, int) {
    return shared;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct ClusterTeam {
  DFLASH_INLINE static auto cluster() { return cooperative_groups::this_cluster(); }
  DFLASH_INLINE static int rank() { return cluster().block_rank(); }
  DFLASH_INLINE static int size() { return cluster().num_blocks(); }
  DFLASH_INLINE static void sync() { cluster().sync(); }
  // Returns the same shared memory of another block of the team.
  template <class S>
  DFLASH_INLINE static const S* of(const S* shared, int rank) {
    return cluster().map_shared_rank(const_cast<S*>(shared), rank);
  }
};
#endif

}  // namespace dflash::DFLASH_ISA
