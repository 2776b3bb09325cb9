// Which calls the portable kernels serve although the GPU has kernels of its own for them, and why.
#pragma once

#include <atomic>
#include <cstdint>

namespace dflash {

// Why Hopper's kernel does not serve a call, one bit a reason; 0: it does. dflash_ext/ops/backends.py has them in words,
// in this order.
enum PortableReason : uint32_t {
  kForwardLayout = 1 << 0,
  kDecodeLayout = 1 << 1,
  kDecodeExact = 1 << 2,
  kDecodeHeadDim = 1 << 3,
  kDecodeHeads = 1 << 4,
  kDecodePages = 1 << 5,
  kLossLayout = 1 << 6,
  kLossVocabulary = 1 << 7,
  kNoSuchKernel = 1u << 31,  // there is none for such calls, or the GPU is another: the portable kernel is the best one
};

extern "C" {
// The reasons of all calls so far. Python reads it by this name after a call, and warns of what is new.
inline std::atomic<uint32_t> dflash_ext_portable_reasons __attribute__((visibility("default"), used)){0};
}

// Keeps the reasons for Python; true if there are none, so that Hopper's kernel serves.
inline bool hopper_serves(uint32_t reasons) {
  if (reasons & ~kNoSuchKernel) {
    dflash_ext_portable_reasons.fetch_or(reasons & ~kNoSuchKernel, std::memory_order_relaxed);
  }
  return reasons == 0;
}

}  // namespace dflash
