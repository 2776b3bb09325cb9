// Hopper's asynchronous copies: a barrier in shared memory that counts bytes, and the bulk copy that fills it.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

DFLASH_INLINE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Initialised by one thread; fence_barriers, then a block barrier, before anybody waits.
struct BytesBarrier {
  uint64_t state;

  DFLASH_INLINE void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
  }

  // Starts copying `bytes` (a multiple of 16, both ends aligned to 16) from global to shared memory.
  DFLASH_INLINE void copy(void* shared, const void* global, uint32_t bytes) {
    const uint32_t barrier = shared_address(&state);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
  }

  DFLASH_INLINE void wait(uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}\n" ::"r"(shared_address(&state)),
        "r"(phase)
        : "memory");
  }
};

DFLASH_INLINE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

}  // namespace dflash::DFLASH_ISA
