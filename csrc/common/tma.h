// Bulk copies by Hopper's copy engine (TMA): of boxes of a tensor that a CUtensorMap describes, and of plain memory.
#pragma once

#include <cuda.h>

#include "common/mbarrier.h"

namespace dflash::DFLASH_ISA {

// cp.async.bulk.tensor, global to shared: starts loading the box that begins at these coordinates; elements outside the
// tensor become zeros. The bytes of the whole box complete on `full`, which must expect them.
DFLASH_INLINE void tma_load(uint32_t shared, const CUtensorMap& map, int c0, int c1, int c2, int c3, Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(&full.state))
      : "memory");
}

// cp.async.bulk, shared to global: starts storing `bytes` of plain memory, a multiple of 16, at aligned addresses.
DFLASH_INLINE void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}

// cp.async.bulk.prefetch.tensor: starts loading a box into the L2 cache.
DFLASH_INLINE void tma_prefetch(const CUtensorMap& map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(c0), "r"(c1),
               "r"(c2), "r"(c3)
               : "memory");
}

// cp.async.bulk.tensor, shared to global: starts storing a box; elements outside the tensor are dropped.
DFLASH_INLINE void tma_store(const CUtensorMap& map, uint32_t shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared)
               : "memory");
}

// cp.async.bulk, global to shared: `bytes` is a multiple of 16 and both addresses are aligned to 16 bytes. The bytes
// complete on `full`, which must expect them.
DFLASH_INLINE void bulk_load(uint32_t shared, const void* global, uint32_t bytes, Mbarrier& full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(&full.state))
               : "memory");
}

// cp.reduce.async.bulk, shared to global: starts adding floats of shared memory to floats of global memory. `bytes` is
// a multiple of 16 and both addresses are aligned to 16 bytes.
DFLASH_INLINE void bulk_add(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}

// cp.async.bulk.commit_group: the thread's stores and additions so far become one group.
DFLASH_INLINE void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// cp.async.bulk.wait_group.read: waits until all but kPending of the thread's groups have read their shared memory,
// which may then be reused. It does not wait for the writes.
template <int kPending>
DFLASH_INLINE void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group: waits until the writes of all but kPending of the thread's groups are visible to it.
template <int kPending>
DFLASH_INLINE void bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// fence.proxy.async: makes the thread's writes to shared memory visible to bulk copies and to wgmma.
DFLASH_INLINE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// prefetch.tensormap
DFLASH_INLINE void prefetch_tensormap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace dflash::DFLASH_ISA
