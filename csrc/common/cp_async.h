// Asynchronous copies of 16 bytes from global to shared memory by single threads (sm_80).
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// cp.async: starts a copy of 16 bytes. Only the first `bytes` (0 or 16) are read; the others become zeros.
DFLASH_INLINE void cp_async(uint32_t shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// cp.async.commit_group: the thread's copies so far become one group.
DFLASH_INLINE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until at most kPending of the thread's groups are in flight.
template <int kPending>
DFLASH_INLINE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace dflash::DFLASH_ISA
