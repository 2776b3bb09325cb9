// One draw per row on Hopper, with a cluster of blocks a row. It serves few rows.
#include "sample/kernels.h"
#include "sample/sample_gpu.h"
#include "sample/team_size.h"

namespace dflash {
namespace {

int team_size_for(const SampleParams& p, void* stream) {
  return team_size(p.rows, p.vocab, p.dtype, p.penalties.any(), 1,
                   static_cast<cudaStream_t>(stream));
}

}  // namespace

bool sample_sm90_serves(const SampleParams& p, void* stream) {
  return hopper_kernels_serve() && p.softcap == 0 && team_size_for(p, stream) > 1;
}

const char* sample_sm90(const SampleParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_sample<T, device::ClusterTeam>(p, team_size_for(p, stream), stream);
  });
}

}  // namespace dflash
