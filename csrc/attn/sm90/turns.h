// Blocks that put float32 sums into global memory together: the first stores its own, and others add theirs. A counter
// in global memory, 0 at first, says how far the sums are. Where blocks take turns it counts the turns that are over,
// and all blocks of the grid must be resident at once.
#pragma once

#include <cuda/atomic>

#include "common/tma.h"

namespace dflash::DFLASH_ISA::sm90 {

// Waits until the counter has come to `turn`: until that many blocks have added, or are done. One thread calls this.
DFLASH_INLINE void wait_for_turn(int32_t* added, int turn) {
  const cuda::atomic_ref<int32_t, cuda::thread_scope_device> counter(*added);
  while (counter.load(cuda::memory_order_acquire) < turn) {
  }
}

// Starts storing kCount floats of shared memory as the first of the sums, or adding them to the sums.
template <int kCount>
DFLASH_INLINE void put_sums(float* sums, uint32_t from, bool is_first) {
  if (is_first) {
    bulk_store(sums, from, kCount * sizeof(float));
  } else {
    bulk_add(sums, from, kCount * sizeof(float));
  }
  bulk_commit_group();
}

// Without turns, the block that claims the sums first stores, and the counter becomes 2 when its sums are there.
// Returns whether that is this block. A block claims sums only when its own are ready, so nobody waits long.
DFLASH_INLINE bool claims_first(int32_t* added) {
  const cuda::atomic_ref<int32_t, cuda::thread_scope_device> counter(*added);
  int32_t found = counter.load(cuda::memory_order_acquire);
  if (found == 0 && counter.compare_exchange_strong(found, 1, cuda::memory_order_acquire)) return true;
  while (found < 2) found = counter.load(cuda::memory_order_acquire);
  return false;
}

DFLASH_INLINE void count_up(int32_t* counter) {
  cuda::atomic_ref<int32_t, cuda::thread_scope_device>(*counter).fetch_add(1, cuda::memory_order_release);
}

// Waits until the thread's additions have reached memory, and gives the turn to the next block.
DFLASH_INLINE void end_turn(int32_t* added) {
  bulk_wait_group<0>();
  count_up(added);
}

}  // namespace dflash::DFLASH_ISA::sm90
