// Masked cross-entropy in place, on Hopper. A cluster of blocks holds a whole row in its shared memory, so that a row
// of any length is read once and written once. Bulk copies load it in pieces; the sums of a piece are computed while
// the next pieces arrive. The blocks exchange their sums through distributed shared memory.
#include <cooperative_groups.h>

#include "common/dispatch.h"
#include "common/tma.h"
#include "loss/kernels.h"
#include "loss/row_part.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 512;
constexpr int kPieces = 4;
constexpr int kMaxCluster = 8;
// With two blocks a multiprocessor, one computes while the other's row arrives.
constexpr int kMaxSliceBytes = 110 * 1024;

template <class T>
__global__ void __launch_bounds__(kThreads, 2) masked_cross_entropy_sm90(const CrossEntropyParams params,
                                                                             const int slice) {
  namespace cg = cooperative_groups;
  constexpr int kSize = Chunk<T>::kSize;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Mbarrier arrived[kPieces];
  __shared__ __align__(16) unsigned char parts_storage[kMaxCluster * sizeof(RowPart)];
  T* const logits = reinterpret_cast<T*>(shared);
  RowPart* const parts = reinterpret_cast<RowPart*>(parts_storage);

  const auto cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const RowHead head(params, blockIdx.x / blocks);
  const int first = rank * slice;
  const int count = max(0, min(slice, int(params.vocab) - first));
  T* const row = static_cast<T*>(params.grad) + head.start(params.grad_strides);
  T* const own = row + first;

  if (head.weight == 0) {
    if (rank == 0 && threadIdx.x == 0) head.write({}, false);
    const float zeros[kSize] = {};
    for (int i = threadIdx.x * kSize; i < count; i += kThreads * kSize) store(own + i, zeros, true);
    return;
  }

  // A block may access another's shared memory once all blocks have arrived here.
  auto all_started = cluster.barrier_arrive();
  const int piece = (slice / kPieces + kSize - 1) / kSize * kSize;
  const auto piece_end = [&](int p) { return p == kPieces - 1 ? count : min(count, (p + 1) * piece); };
  if (threadIdx.x == 0) {
    for (int p = 0; p < kPieces; ++p) arrived[p].init();
    fence_mbarrier_init();
    for (int p = 0; p < kPieces; ++p) {
      const int begin = min(count, p * piece), end = piece_end(p);
      if (begin == end) continue;
      const uint32_t bytes = (end - begin) * sizeof(T);
      arrived[p].arrive_and_expect_tx(bytes);
      bulk_load(shared_address(logits + begin), own + begin, bytes, arrived[p]);
    }
  }
  // The target's logit is read before any block may overwrite it.
  const float target_logit = head.target < 0 ? kNaN : to_float(row[head.target]);
  __syncthreads();

  const RowLoss<float> loss(params);
  const float no_teacher[kSize] = {};
  RowPart part;
  for (int p = 0; p < kPieces; ++p) {
    const int begin = min(count, p * piece), end = piece_end(p);
    if (begin < end) arrived[p].wait(0);
    for (int i = begin + threadIdx.x * kSize; i < end; i += kThreads * kSize) {
      float x[kSize];
      load(x, logits + i, true);
      part.add<false>(loss, head.target, first + i, x, no_teacher);
    }
  }
  part = block_merge<kThreads>(part);
  cluster.barrier_wait(static_cast<decltype(all_started)&&>(all_started));
  if (threadIdx.x < blocks) cluster.map_shared_rank(parts, threadIdx.x)[rank] = part;
  cluster.sync();
  part = parts[0];
  for (int b = 1; b < blocks; ++b) part.merge(parts[b]);

  if (rank == 0 && threadIdx.x == 0) {
    head.write(loss.values(part, loss.softcap(target_logit), 0), part.is_argmax(head.target, target_logit));
  }
  const RowGradient<float> gradient(loss, loss.stats(part), head.target < 0 ? kNaN : head.weight);
  for (int i = threadIdx.x * kSize; i < count; i += kThreads * kSize) {
    float x[kSize], g[kSize];
    load(x, logits + i, true);
    gradients<false>(g, gradient, loss.softcap, head.target, first + i, x, no_teacher);
    store(own + i, g, true);
  }
}

int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int cluster_size_for(const CrossEntropyParams& p) {
  const int64_t bytes = p.vocab * bytes_of(p.dtype);
  int blocks = 1;
  while (blocks <= kMaxCluster && bytes > int64_t(blocks) * kMaxSliceBytes) blocks *= 2;
  return blocks;
}

template <class T>
cudaError_t launch_rows_in_place(const CrossEntropyParams& p, cudaStream_t stream) {
  const int blocks = cluster_size_for(p);
  constexpr int kSize = Chunk<T>::kSize;
  const int slice = (p.vocab / blocks + kSize - 1) / kSize * kSize + (p.vocab % blocks ? kSize : 0);
  const LaunchShape shape{p.rows * blocks, kThreads, slice * static_cast<int>(sizeof(T)), blocks};
  return launch_kernel(masked_cross_entropy_sm90<T>, shape, stream, p, slice);
}

}  // namespace
}  // namespace device

uint32_t masked_cross_entropy_sm90_misses(const CrossEntropyParams& p) {
  if (!hopper_kernels_serve() || p.pass != Pass::kInPlace || p.teacher_kind != Teacher::kNone) return kNoSuchKernel;
  // Bulk copies need rows that start and end at multiples of 16 bytes.
  const int64_t bytes = device::bytes_of(p.dtype);
  const bool is_aligned = (reinterpret_cast<uintptr_t>(p.logits) | p.vocab * bytes | p.logits_strides.outer * bytes |
                           p.logits_strides.inner * bytes) % 16 == 0;
  return (is_aligned ? 0 : kLossLayout) | (device::cluster_size_for(p) <= device::kMaxCluster ? 0 : kLossVocabulary);
}

const char* masked_cross_entropy_sm90(const CrossEntropyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_rows_in_place<T>(p, stream);
  });
}

}  // namespace dflash
