// One draw per row on Hopper, with a cluster of blocks a row. It serves few rows, and many long ones with filters.
#include "sample/kernels.h"
#include "sample/sample_gpu.h"
#include "sample/team_size.h"

namespace dflash {
namespace {

TeamShape team_for(const SampleParams& p, void* stream) {
  const bool rereads = !p.penalties.any() && (p.filters.any || p.confidence);
  return team_shape(p.rows, p.vocab, row_bytes_of(p.dtype, p.vocab), rereads, static_cast<cudaStream_t>(stream));
}

}  // namespace

bool sample_sm90_serves(const SampleParams& p, void* stream) {
  return hopper_kernels_serve() && team_for(p, stream).size > 1;
}

const char* sample_sm90(const SampleParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_sample<T, device::ClusterTeam>(p, team_for(p, stream), stream);
  });
}

}  // namespace dflash
