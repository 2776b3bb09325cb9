// Programmatic dependent launch (sm_90): a kernel whose launch overlaps_previous may start before the stream's previous
// kernel has ended.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

// griddepcontrol.launch_dependents: the stream's next kernel may start now.
DFLASH_INLINE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// griddepcontrol.wait: waits until the stream's previous kernel has ended and its writes are visible.
DFLASH_INLINE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace dflash::DFLASH_ISA
