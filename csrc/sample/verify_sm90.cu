// Speculative sampling on Hopper, with a cluster of blocks per position of a draft. It serves few positions, and many with filters.
#include "sample/kernels.h"
#include "sample/team_size.h"
#include "sample/verify_gpu.h"

namespace dflash {
namespace {

TeamShape team_for(const VerifyParams& p, void* stream) {
  return team_shape(p.rows * (p.drafted + 1), p.vocab, row_bytes_of(p.dtype, p.vocab),
                    !p.penalties.any() && p.filters.any, static_cast<cudaStream_t>(stream));
}

}  // namespace

bool verify_sm90_serves(const VerifyParams& p, void* stream) {
  return hopper_kernels_serve() && team_for(p, stream).size > 1;
}

const char* verify_sm90(const VerifyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_verify<T, device::ClusterTeam>(p, team_for(p, stream), stream);
  });
}

}  // namespace dflash
