// setmaxnreg (sm_90a): moves registers between the warpgroups of a block, from a producer that needs few to consumers
// that need many. It only redistributes the registers that the block got at launch; a larger sum hangs.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

constexpr int kWarpgroup = 128;  // threads

// Registers that a block of one per multiprocessor gets at launch for each of its threads.
constexpr int registers_at_launch(int threads) {
  const int share = 65536 / threads / 8 * 8;
  return share < 255 ? share : 255;
}

// Whether one producer warpgroup and some consumer warpgroups can have these numbers of registers.
constexpr bool registers_suffice(int consumers, int of_producer, int of_consumer) {
  return of_producer % 8 == 0 && of_consumer % 8 == 0 &&
         of_producer + consumers * of_consumer <= (1 + consumers) * registers_at_launch((1 + consumers) * kWarpgroup);
}

// setmaxnreg.inc: waits until the registers are free.
template <int kRegisters>
DFLASH_INLINE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.dec
template <int kRegisters>
DFLASH_INLINE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace dflash::DFLASH_ISA
