// Warpgroup matrix products (wgmma, sm_90a): 64 rows, kN columns, steps of 16 along the sum. The accumulator of a
// thread is laid out as that of mma.sync; warp w holds rows 16w to 16w + 15.
//
// Operands in shared memory lie in panels of 64 elements (128 bytes a row) under the 128-byte swizzle, as TMA writes
// them. Every panel is aligned to 1024 bytes. A matrix descriptor names an operand's start and strides; its address
// counts in units of 16 bytes, so that 32 bytes further is descriptor + 2.
#pragma once

#include "common/device.h"

namespace dflash::DFLASH_ISA {

constexpr int kPanelColumns = 64, kPanelRowBytes = 128;

// Returns the address in a way that hides its origin from the compiler, which then computes sums with it where they are
// needed, rather than keeping them in registers over a whole loop.
DFLASH_INLINE uint32_t opaque(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

// Returns the value of lane 0, which tells the compiler that all lanes hold the same. What follows from it stays in
// uniform registers, and descriptors cost no vector instructions between two products.
DFLASH_INLINE uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// Within a cluster the upper bits of a shared address name the block. An operand is always the block's own, so they are
// cleared.
DFLASH_INLINE uint64_t descriptor_start(uint32_t address) { return (address & 0x3ffff) >> 4; }

// A K-major operand: its rows run along M or N, and the sum runs along the panel's columns. 16 columns further is 32
// bytes further in the panel.
DFLASH_INLINE uint64_t k_major_descriptor(uint32_t address) {
  return descriptor_start(address) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// An MN-major operand: its rows run along the sum, and the panels' columns along M or N. The next 64 columns begin
// `panel_bytes` further.
DFLASH_INLINE uint64_t mn_major_descriptor(uint32_t address, uint32_t panel_bytes) {
  return descriptor_start(address) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// wgmma.fence: orders the warpgroup's register accesses before the products that follow.
DFLASH_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: the products so far become one group.
DFLASH_INLINE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: waits until at most kPending groups are in flight.
template <int kPending>
DFLASH_INLINE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator across this point.
template <int kCount>
DFLASH_INLINE void fence_accumulator(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The values are PTX's transpose flags.
enum Major { kMajorK = 0, kMajorMN = 1 };

template <class T, int kN>
struct Wgmma;

#define DFLASH_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DFLASH_LIST_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DFLASH_LIST_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DFLASH_LIST_80 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
#define DFLASH_LIST_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
#define DFLASH_LIST_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, " \
  "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
  "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define DFLASH_FLOATS_1(i) "+f"(d[i])
#define DFLASH_FLOATS_4(i) \
  DFLASH_FLOATS_1(i), DFLASH_FLOATS_1((i) + 1), DFLASH_FLOATS_1((i) + 2), DFLASH_FLOATS_1((i) + 3)
#define DFLASH_FLOATS_8(i) DFLASH_FLOATS_4(i), DFLASH_FLOATS_4((i) + 4)
#define DFLASH_FLOATS_FROM(i) \
  DFLASH_FLOATS_8(i), DFLASH_FLOATS_8((i) + 8), DFLASH_FLOATS_8((i) + 16), DFLASH_FLOATS_8((i) + 24)
#define DFLASH_FLOATS_16 DFLASH_FLOATS_8(0)
#define DFLASH_FLOATS_32 DFLASH_FLOATS_8(0), DFLASH_FLOATS_8(8)
#define DFLASH_FLOATS_64 DFLASH_FLOATS_FROM(0)
#define DFLASH_FLOATS_80 DFLASH_FLOATS_FROM(0), DFLASH_FLOATS_8(32)
#define DFLASH_FLOATS_128 DFLASH_FLOATS_FROM(0), DFLASH_FLOATS_FROM(32)
#define DFLASH_FLOATS_256 DFLASH_FLOATS_128, DFLASH_FLOATS_FROM(64), DFLASH_FLOATS_FROM(96)

// wgmma.mma_async: d (+)= a b. `ss` has both operands in shared memory; `rs` has a in registers, laid out as the A
// fragment of mma.sync. a0 to a6 number the operands that follow the accumulator.
#define DFLASH_WGMMA(T, kN, name, a0, a1, a2, a3, a4, a5, a6)                                                          \
  template <>                                                                                                          \
  struct Wgmma<T, kN> {                                                                                                \
    template <Major kA, Major kB>                                                                                      \
    DFLASH_INLINE static void ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " a2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN                \
                   "k16.f32." name "." name " {" DFLASH_LIST_##kN "}, " a0 ", " a1 ", p, 1, 1, " a3 ", " a4 ";\n}\n"   \
                   : DFLASH_FLOATS_##kN                                                                                \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)));                                \
    }                                                                                                                  \
    template <Major kB>                                                                                                \
    DFLASH_INLINE static void rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " a5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN                \
                   "k16.f32." name "." name " {" DFLASH_LIST_##kN "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " a4           \
                   ", p, 1, 1, " a6 ";\n}\n"                                                                           \
                   : DFLASH_FLOATS_##kN                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB)));          \
    }                                                                                                                  \
  };

DFLASH_WGMMA(__nv_bfloat16, 16, "bf16", "%8", "%9", "%10", "%11", "%12", "%13", "%14")
DFLASH_WGMMA(__half, 16, "f16", "%8", "%9", "%10", "%11", "%12", "%13", "%14")
DFLASH_WGMMA(__nv_bfloat16, 32, "bf16", "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DFLASH_WGMMA(__half, 32, "f16", "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DFLASH_WGMMA(__nv_bfloat16, 64, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
DFLASH_WGMMA(__half, 64, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
DFLASH_WGMMA(__nv_bfloat16, 80, "bf16", "%40", "%41", "%42", "%43", "%44", "%45", "%46")
DFLASH_WGMMA(__half, 80, "f16", "%40", "%41", "%42", "%43", "%44", "%45", "%46")
DFLASH_WGMMA(__nv_bfloat16, 128, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
DFLASH_WGMMA(__half, 128, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
DFLASH_WGMMA(__nv_bfloat16, 256, "bf16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")
DFLASH_WGMMA(__half, 256, "f16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef DFLASH_WGMMA

}  // namespace dflash::DFLASH_ISA
