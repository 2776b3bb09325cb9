// The shared memory with which a block of Hopper's attention kernels begins.
#pragma once

#include "common/launch.h"
#include "common/mbarrier.h"
#include "common/wgmma.h"

namespace dflash::DFLASH_ISA::sm90 {

// The static part of a block's shared memory, and where its dynamic part begins, aligned to 1024 bytes.
template <class Shared>
struct BlockMemory {
  Shared& shared;
  uint32_t dynamic;
};

// Lays out shared memory and calls init(arguments...) of its static part. All threads of a block call this once.
//
// Shared memory is addressed through a uniform register. Reading a block's shared window takes 50 clocks, and the
// compiler would read it again for every tile.
template <class Shared, int kDynamicBytes, class... Arguments>
DFLASH_INLINE BlockMemory<Shared> begin_block(const Arguments&... arguments) {
  extern __shared__ unsigned char unaligned[];
  __shared__ Shared storage;
  static_assert(kDynamicBytes + sizeof(storage) <= kMaxSharedBytes);
  auto& shared = *static_cast<Shared*>(__cvta_shared_to_generic(uniform(shared_address(&storage))));
  const uint32_t dynamic = uniform((shared_address(unaligned) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    shared.init(arguments...);
    fence_mbarrier_init();
  }
  __syncthreads();
  return {shared, dynamic};
}

}  // namespace dflash::DFLASH_ISA::sm90
