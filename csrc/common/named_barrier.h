// Named barriers: barriers among `count` of a block's threads, a multiple of 32. Mbarrier 0 is __syncthreads' own; each
// kernel keeps the ids that it uses in one enum.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// bar.sync: arrives and waits.
DFLASH_INLINE void named_barrier_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// bar.arrive: arrives without waiting.
DFLASH_INLINE void named_barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// barrier.cta.red.or: arrives, waits, and returns whether `value` holds for any of the threads.
DFLASH_INLINE bool named_barrier_any(int id, int count, bool value) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred own, any;\n"
      "setp.ne.s32 own, %3, 0;\n"
      "barrier.cta.red.or.pred any, %1, %2, own;\n"
      "selp.s32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(count), "r"(static_cast<int>(value))
      : "memory");
  return any != 0;
}

}  // namespace dflash::DFLASH_ISA
