// Which calls the portable kernels serve on a Hopper GPU, and why.
#pragma once

#include <atomic>
#include <cstdint>

namespace dflash {

// Why a Hopper kernel does not serve a call, one bit a reason; 0 means that it does. dflash_ext/ops/backends.py has the
// reasons in words, in this order.
enum PortableReason : uint32_t {
  kForwardLayout = 1 << 0,
  kDecodeLayout = 1 << 1,
  kDecodeHeadDim = 1 << 2,
  kDecodeHeads = 1 << 3,
  kDecodePages = 1 << 4,
  kLossLayout = 1 << 5,
  kLossVocabulary = 1 << 6,
  kBackwardLayout = 1 << 7,
  kBackwardDeterministic = 1 << 8,
  kNoSuchKernel = 1u << 31,  // no Hopper kernel exists for such calls, or the GPU is not a Hopper: nothing to warn of
};

extern "C" {
// The reasons of all calls so far. Python reads this symbol after a call, and warns of new reasons.
inline std::atomic<uint32_t> dflash_ext_portable_reasons __attribute__((visibility("default"), used)){0};
}

// Records the reasons for Python. Returns whether there are none, so that the Hopper kernel serves the call.
inline bool hopper_serves(uint32_t reasons) {
  if (reasons & ~kNoSuchKernel) {
    dflash_ext_portable_reasons.fetch_or(reasons & ~kNoSuchKernel, std::memory_order_relaxed);
  }
  return reasons == 0;
}

}  // namespace dflash
