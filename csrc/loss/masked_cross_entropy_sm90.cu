// Masked cross-entropy in place, on Hopper. A cluster of blocks holds a whole row in its shared memory, so that a row
// of any length is read once and written once. Bulk copies load it in pieces; the sums of a piece are computed while
// the next pieces arrive. Every warp sends its sums to all blocks of the cluster through distributed shared memory, and
// a block goes on to the gradients as soon as the sums of all warps are there.
#include "common/cluster.h"
#include "common/dispatch.h"
#include "common/tma.h"
#include "loss/kernels.h"
#include "loss/row_part.h"

namespace dflash {
namespace device {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPieces = 4;
constexpr int kMaxCluster = 8;
// As many blocks of so many bytes share a multiprocessor: while some compute, the rows of others arrive or leave.
constexpr int kBlocksAtOnce = 5, kWantedSliceBytes = 48 * 1024, kMaxSliceBytes = 110 * 1024;

// The sums of a warp.
struct SentPart {
  float4 halves[2];
};

struct CrossEntropyShared {
  Mbarrier arrived[kPieces], sums_arrived;
  SentPart parts[kMaxCluster * kWarps];
};

template <class T>
struct CrossEntropyBlock {
  static constexpr int kSize = Chunk<T>::kSize;

  CrossEntropyShared& shared;
  T* const logits;  // the block's slice of the row, in shared memory
  const int blocks = cluster_size(), rank = cluster_rank();

  // The sums of all lanes of a warp.
  DFLASH_INLINE static RowPart of_warp(RowPart part) {
    float max = part.max;
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, mask));
    part.raise(max, -kInfinity);
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      part.e += __shfl_xor_sync(~0u, part.e, mask);
      part.e_d += __shfl_xor_sync(~0u, part.e_d, mask);
      part.d += __shfl_xor_sync(~0u, part.d, mask);
      part.count += __shfl_xor_sync(~0u, part.count, mask);
      part.before = fmaxf(part.before, __shfl_xor_sync(~0u, part.before, mask));
      part.rest = fmaxf(part.rest, __shfl_xor_sync(~0u, part.rest, mask));
    }
    return part;
  }

  // The sums of the row. The barriers of all blocks are there when the cluster has met.
  DFLASH_INLINE RowPart of_row(RowPart part) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    part = of_warp(part);
    cluster_wait();
    if (lane < blocks) {
      const uint32_t to = map_to_rank(shared_address(&shared.parts[rank * kWarps + warp]), lane);
      write_remotely(to, part.max, part.e, part.e_d, part.d);
      write_remotely(to + 16, part.count, part.before, part.rest, 0);
      arrive_remotely(map_to_rank(shared_address(&shared.sums_arrived), lane));
    }
    shared.sums_arrived.wait_cluster(0);
    RowPart sum;
    for (int i = lane; i < blocks * kWarps; i += 32) {
      const auto& [a, b] = shared.parts[i].halves;
      RowPart other;
      other.max = a.x, other.e = a.y, other.e_d = a.z, other.d = a.w;
      other.count = b.x, other.before = b.y, other.rest = b.z;
      sum.merge(other);
    }
    return of_warp(sum);
  }

  // Calls f(index, logits) for the thread's neighbouring logits between these, of which the ends are multiples of kSize.
  template <class F>
  DFLASH_INLINE void for_each(int begin, int end, F&& f) const {
    for (int i = begin + threadIdx.x * kSize; i < end; i += kThreads * kSize) {
      float x[kSize];
      load(x, logits + i, true);
      f(i, x);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    masked_cross_entropy_sm90(const __grid_constant__ CrossEntropyParams params, const int slice) {
  constexpr int kSize = Chunk<T>::kSize;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ CrossEntropyShared shared;
  const CrossEntropyBlock<T> block{shared, reinterpret_cast<T*>(dynamic)};
  const RowHead head(params, blockIdx.x / block.blocks);
  const int first = block.rank * slice, count = max(0, min(slice, int(params.vocab) - first));
  T* const row = static_cast<T*>(params.grad) + head.start(params.grad_strides);
  T* const own = row + first;
  const bool writes = block.rank == 0 && threadIdx.x == 0;

  if (head.weight == 0) {
    if (writes) head.write({}, false);
    const float zeros[kSize] = {};
    for (int i = threadIdx.x * kSize; i < count; i += kThreads * kSize) store(own + i, zeros, true);
    return;
  }

  const int piece = (slice / kPieces + kSize - 1) / kSize * kSize;
  const auto piece_end = [&](int p) { return p == kPieces - 1 ? count : min(count, (p + 1) * piece); };
  if (threadIdx.x == 0) {
    for (Mbarrier& each : shared.arrived) each.init();
    shared.sums_arrived.init(block.blocks * kWarps);
    fence_mbarrier_init();
    for (int p = 0; p < kPieces; ++p) {
      const int begin = min(count, p * piece), end = piece_end(p);
      if (begin == end) continue;
      const uint32_t bytes = (end - begin) * sizeof(T);
      shared.arrived[p].arrive_and_expect_tx(bytes);
      bulk_load(shared_address(block.logits + begin), own + begin, bytes, shared.arrived[p]);
    }
  }
  // The target's logit is read before any block may overwrite it.
  const float target_logit = head.target < 0 ? kNaN : to_float(row[head.target]);
  __syncthreads();
  cluster_arrive();

  const RowLoss<float> loss(params);
  RowPart part;
  for (int p = 0; p < kPieces; ++p) {
    const int begin = min(count, p * piece), end = piece_end(p);
    if (begin < end) shared.arrived[p].wait(0);
    block.for_each(begin, end, [&](int i, auto& x) { part.add<T, false>(loss, head.target, first + i, x, x); });
  }
  part = block.of_row(part);
  __syncwarp();
  cluster_arrive_relaxed();

  if (writes) head.write(loss.values(part, loss.softcap(target_logit), 0), part.is_argmax(head.target, target_logit));
  const RowGradient<float> gradient(loss, loss.stats(part), head.target < 0 ? kNaN : head.weight);
  block.for_each(0, count, [&](int i, auto& x) {
    float g[kSize];
    gradients<false>(g, gradient, loss.softcap, head.target, first + i, x, x);
    store(own + i, g, true);
  });
  // A block's shared memory stays until the whole cluster has its sums.
  __syncwarp();
  cluster_wait();
}

int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int cluster_size_for(const CrossEntropyParams& p) {
  const int64_t bytes = p.vocab * bytes_of(p.dtype);
  int blocks = 1;
  while (blocks < kMaxCluster && bytes > int64_t(blocks) * kWantedSliceBytes) blocks *= 2;
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
  const int64_t bytes = device::bytes_of(p.dtype), row_bytes = p.vocab * bytes;
  const bool is_aligned = (reinterpret_cast<uintptr_t>(p.logits) | row_bytes | p.logits_strides.outer * bytes |
                           p.logits_strides.inner * bytes) % 16 == 0;
  const bool fits = row_bytes <= device::kMaxCluster * device::kMaxSliceBytes;
  return (is_aligned ? 0 : kLossLayout) | (fits ? 0 : kLossVocabulary);
}

const char* masked_cross_entropy_sm90(const CrossEntropyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_rows_in_place<T>(p, stream);
  });
}

}  // namespace dflash
