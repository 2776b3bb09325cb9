// Hopper's asynchronous copies: a barrier in shared memory that counts arrivals and bytes, the bulk copies that fill
// shared memory and complete on it, and the stores that empty it.
#pragma once

#include <cuda.h>

#include "common/mma.h"

namespace dflash::DFLASH_ISA {

// Initialised by one thread; fence_barriers, then a block barrier, before anybody waits. A phase ends when all
// arrivals and all expected bytes are there; phases are waited for by their parity.
struct Barrier {
  uint64_t state;

  DFLASH_INLINE void init(uint32_t arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
  }

  DFLASH_INLINE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
  }

  // An arrival that brings bytes along.
  DFLASH_INLINE void expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
  }

  // Starts copying `bytes` (a multiple of 16, both ends aligned to 16) from global to shared memory.
  DFLASH_INLINE void copy(void* shared, const void* global, uint32_t bytes) {
    expect(bytes);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(&state))
                 : "memory");
  }

  // Starts copying the box of a tensor that begins at the coordinates; its bytes are expected separately.
  DFLASH_INLINE void copy(uint32_t shared, const CUtensorMap& map, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(shared),
        "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(&state))
        : "memory");
  }

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
};

// Stages of shared memory that a producer fills and consumers empty, one after another.
template <int kStages>
struct Ring {
  Barrier full[kStages], empty[kStages];

  // `arrivals` say that a stage is empty.
  DFLASH_INLINE void init(uint32_t arrivals) {
    for (int i = 0; i < kStages; ++i) {
      full[i].init();
      empty[i].init(arrivals);
    }
  }
};

// A place in a ring. Consumers begin at parity 0, producers at 1: at first every stage is empty.
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

DFLASH_INLINE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What the thread has written to shared memory becomes visible to asynchronous copies and products.
DFLASH_INLINE void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts copying a box from shared memory into a tensor; what lies outside the tensor is dropped.
DFLASH_INLINE void store_box(const CUtensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared)
               : "memory");
}

DFLASH_INLINE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the thread's stores have read their shared memory.
DFLASH_INLINE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Barriers among some of a block's threads: `count` of them, waiting or only arriving.
DFLASH_INLINE void named_barrier_wait(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
DFLASH_INLINE void named_barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// The cluster that a block belongs to: its place there, how many blocks there are.
DFLASH_INLINE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DFLASH_INLINE int cluster_blocks() {
  int count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// A barrier of all threads of the cluster that have not left. It orders nothing in memory but what a block has read.
DFLASH_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DFLASH_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// The same place in the shared memory of another block of the cluster.
DFLASH_INLINE uint32_t remote_address(uint32_t shared, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
}

// Starts copying from the block's shared memory to that of another; the bytes arrive at a barrier of that block.
DFLASH_INLINE void send(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   remote),
               "r"(shared), "r"(bytes), "r"(remote_barrier)
               : "memory");
}

DFLASH_INLINE void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start although this one has not ended, and waits
// itself for what it reads.
DFLASH_INLINE void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DFLASH_INLINE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Moves registers between the warpgroups of a block.
template <int kRegisters>
DFLASH_INLINE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DFLASH_INLINE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DFLASH_INLINE void store_matrices(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace dflash::DFLASH_ISA
