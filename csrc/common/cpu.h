// Runs a CPU kernel in the build for this machine's instruction set, on torch's own threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "common/check.h"
#include "common/cpu_queue.h"

// Declares a kernel `void name(const Params&, int64_t begin, int64_t end)` for every instruction set, and defines
// `name` as the table of them.
#if defined(__x86_64__)
#define DFLASH_CPU_KERNEL(Params, name)                                        \
  namespace baseline { void name(const Params&, int64_t, int64_t); }           \
  namespace avx2 { void name(const Params&, int64_t, int64_t); }               \
  namespace avx512 { void name(const Params&, int64_t, int64_t); }             \
  inline constexpr CpuKernel<Params> name{baseline::name, avx2::name, avx512::name};
#else
#define DFLASH_CPU_KERNEL(Params, name)                                        \
  namespace baseline { void name(const Params&, int64_t, int64_t); }           \
  inline constexpr CpuKernel<Params> name{baseline::name, baseline::name, baseline::name};
#endif

namespace dflash {

template <class Params>
struct CpuKernel {
  using Function = void (*)(const Params&, int64_t, int64_t);
  Function baseline, avx2, avx512;
};

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Returns the best instruction set of this machine, or the lesser one that DFLASH_EXT_CPU_ISA names (for tests and
// comparisons).
inline Isa isa() {
  static const Isa chosen = [] {
    const char* asked = std::getenv("DFLASH_EXT_CPU_ISA");
    const std::string_view limit = asked ? asked : "";
    check(limit.empty() || limit == "baseline" || limit == "avx2" || limit == "avx512",
          "DFLASH_EXT_CPU_ISA is '", limit, "': baseline, avx2 and avx512 are supported");
    if (limit == "baseline") return Isa::kBaseline;
#if defined(__x86_64__)
    if (limit != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
    return Isa::kBaseline;
  }();
  return chosen;
}

// Calls the kernel over [0, count) in ranges of at least `grain`, on the threads that torch.set_num_threads allows. If a
// queue is open, the kernel waits in it with a copy of params. What params point to must live until the queue has run.
template <class Params>
void run_on_cpu(const CpuKernel<Params>& kernel, const Params& params, int64_t count, int64_t grain) {
  struct Work {
    typename CpuKernel<Params>::Function function;
    const Params& params;
  };
  const auto function = isa() == Isa::kAvx512 ? kernel.avx512 : isa() == Isa::kAvx2 ? kernel.avx2 : kernel.baseline;
  if (CpuQueue* queue = CpuQueue::open()) {
    return queue->add([=](int64_t begin, int64_t end) { function(params, begin, end); }, count, grain);
  }
  Work work{function, params};
  const auto range = [](int64_t begin, int64_t end, void* context) {
    const Work& w = *static_cast<Work*>(context);
    w.function(w.params, begin, end);
  };
  check(torch_parallel_for(0, count, grain, range, &work) == 0, "torch's parallel_for failed");
}

}  // namespace dflash
