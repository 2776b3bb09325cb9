// mbarriers: barriers in shared memory that count arrivals of threads and bytes of asynchronous copies (sm_90).
#pragma once

#include "common/shared_memory.h"

namespace dflash::DFLASH_ISA {

// One thread initialises a barrier and calls fence_mbarrier_init; a block barrier follows before any other thread uses
// it. A phase completes when all arrivals and all expected bytes are there. Waits name the phase by its parity.
struct Mbarrier {
  uint64_t state;

  // mbarrier.init
  DFLASH_INLINE void init(uint32_t arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
  }

  // mbarrier.arrive
  DFLASH_INLINE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
  }

  // mbarrier.arrive.expect_tx: arrives, and makes the phase wait for `bytes` of copies as well.
  DFLASH_INLINE void arrive_and_expect_tx(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
  }

  // mbarrier.try_wait.parity, until the phase of this parity has completed.
  DFLASH_INLINE void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}\n" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }

  // The same for what threads of another block have written: their writes are visible afterwards.
  DFLASH_INLINE void wait_cluster(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}\n" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

// fence.mbarrier_init: makes initialised barriers visible to the copy engine and to the cluster.
DFLASH_INLINE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The barriers of a ring of stages in shared memory. A producer fills the stages and consumers empty them, in turn.
template <int kStages>
struct Ring {
  Mbarrier full[kStages], empty[kStages];

  // A stage is empty after this many arrivals.
  DFLASH_INLINE void init(uint32_t arrivals) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init();
      empty[i].init(arrivals);
    }
  }
};

// A position in a ring. Consumers begin with parity 0. Producers begin with parity 1, because every stage is empty at
// first.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  DFLASH_INLINE void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dflash::DFLASH_ISA
