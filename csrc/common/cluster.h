// Thread block clusters, and copies between the shared memories of their blocks (sm_90).
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// %cluster_ctarank: the block's rank in its cluster.
DFLASH_INLINE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// %cluster_nctarank: how many blocks the cluster has.
DFLASH_INLINE int cluster_size() {
  int count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// barrier.cluster: a barrier of all threads of the cluster that have not exited. An arrival publishes the thread's
// writes to those who wait. The relaxed arrival publishes no writes; it only says that the thread's reads are done.
DFLASH_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
DFLASH_INLINE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DFLASH_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// mapa: the same address in the shared memory of another block of the cluster.
DFLASH_INLINE uint32_t map_to_rank(uint32_t shared, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
}

// ld.shared::cluster of a float, or of four. `remote` comes from map_to_rank.
DFLASH_INLINE float read_remote(uint32_t remote) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
}
DFLASH_INLINE float4 read_remote_v4(uint32_t remote) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(remote)
               : "memory");
  return value;
}

// cp.async.bulk, shared to another block's shared memory: the bytes complete on an mbarrier of that block. `remote` and
// `remote_barrier` come from map_to_rank.
DFLASH_INLINE void bulk_send(uint32_t remote, uint32_t shared, uint32_t bytes, uint32_t remote_barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   remote),
               "r"(shared), "r"(bytes), "r"(remote_barrier)
               : "memory");
}

// st.shared::cluster: writes 16 bytes to another block's shared memory. `remote` comes from map_to_rank.
DFLASH_INLINE void write_remotely(uint32_t remote, float a, float b, float c, float d) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// mbarrier.arrive on another block's barrier, whose address comes from map_to_rank.
DFLASH_INLINE void arrive_remotely(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}

}  // namespace dflash::DFLASH_ISA
