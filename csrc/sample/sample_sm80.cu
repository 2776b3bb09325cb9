// One draw per row on any GPU since Ampere, with one block a row.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/sample_gpu.h"

namespace dflash {

const char* sample_sm80(const SampleParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    using namespace device;
    if (p.softcap == 0) return launch_sample<T, BlockTeam>(p, 1, stream);
    using Source = CappedLogits<T>;
    const auto shape = team_shape<Source, BlockTeam>(p.rows, p.vocab, 1);
    return launch_kernel(sample_rows<Source, BlockTeam, false>, shape, stream, p);
  });
}

}  // namespace dflash
