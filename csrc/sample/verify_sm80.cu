// Speculative sampling on any GPU since Ampere, with one block per position of a draft.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/verify_gpu.h"

namespace dflash {

const char* verify_sm80(const VerifyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_verify<T, device::BlockTeam>(p, 1, stream);
  });
}

}  // namespace dflash
