// Speculative sampling on Hopper, with a cluster of blocks per position of a draft. It serves few positions.
#include "sample/kernels.h"
#include "sample/team_size.h"
#include "sample/verify_gpu.h"

namespace dflash {
namespace {

int team_size_for(const VerifyParams& p, void* stream) {
  return team_size(p.rows * (p.drafted + 1), p.vocab, p.dtype, p.penalties.any(), device::kept_rows_of(p),
                   static_cast<cudaStream_t>(stream));
}

}  // namespace

bool verify_sm90_serves(const VerifyParams& p, void* stream) {
  return hopper_kernels_serve() && team_size_for(p, stream) > 1;
}

const char* verify_sm90(const VerifyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_verify<T, device::ClusterTeam>(p, team_size_for(p, stream), stream);
  });
}

}  // namespace dflash
