// One draw per row on any GPU since Ampere, with one block a row.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/sample_gpu.h"

namespace dflash {

const char* sample_sm80(const SampleParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_sample<T, device::BlockTeam>(p, 1, stream);
  });
}

}  // namespace dflash
