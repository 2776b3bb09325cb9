// Masked cross-entropy in place, on Hopper. A cluster of blocks holds a whole row in its shared memory, so that a row
// of any length is read once and written once.
//
// The blocks stay for many rows, of which each has the same slice. A slice passes through a ring of pieces: one thread
// loads the pieces by bulk copies and stores them again as gradients, in the order of the rows. It loads the next rows
// while the other threads compute. They add a row's sums, send them to all blocks of the cluster through distributed
// shared memory, and turn the logits into gradients once all sums have arrived.
#include "common/cluster.h"
#include "common/dispatch.h"
#include "common/tma.h"
#include "loss/kernels.h"
#include "loss/row_part.h"

namespace dflash {
namespace device {
namespace {

constexpr int kConsumers = 256, kWarps = kConsumers / 32, kThreads = kConsumers + 32;
constexpr int kMaxCluster = 8;
// Two blocks with such rings fit on a multiprocessor: one computes while the other waits for its cluster.
constexpr int kBlocksAtOnce = 2, kSlots = 26, kMaxPieceBytes = 4096, kRingBytes = kSlots * kMaxPieceBytes;
// A row's slice leaves one slot free, because a slot is loaded only when the next piece has been stored.
constexpr int kMaxSliceBytes = kRingBytes - kMaxPieceBytes;

struct Slicing {
  int slice, piece;  // elements that a block has of a row, and of its pieces but the last
};

// What the blocks of a cluster tell each other about a row: the sums of each warp.
struct SentPart {
  float4 halves[2];
};

struct CrossEntropyShared {
  Ring<kSlots> ring;  // a piece is full when it is loaded, and empty when its gradients wait to be stored
  Mbarrier sums_arrived[2];
  SentPart parts[2][kMaxCluster * kWarps];  // of a row, and of the next
};

template <class T>
struct CrossEntropyBlock {
  static constexpr int kSize = Chunk<T>::kSize;

  const CrossEntropyParams& p;
  CrossEntropyShared& shared;
  uint8_t* const slots;
  const Slicing slicing;
  const int blocks = cluster_size(), rank = cluster_rank();
  const int clusters = gridDim.x / blocks, first_row = blockIdx.x / blocks;
  const int first = rank * slicing.slice;
  const int count = max(0, min(slicing.slice, int(p.vocab) - first));

  DFLASH_INLINE T* slot(const Stage<kSlots>& at) const {
    return reinterpret_cast<T*>(slots + at.index * kMaxPieceBytes);
  }

  // The block's slice of a row.
  DFLASH_INLINE T* slice_of(const RowHead& head) const {
    return static_cast<T*>(p.grad) + head.start(p.grad_strides) + first;
  }

  // Walks along the pieces of all rows that count.
  struct Walk {
    const CrossEntropyBlock& block;
    Stage<kSlots> at;
    int row, begin = 0;  // the piece's first element in the slice
    T* slice = nullptr;

    DFLASH_INLINE explicit Walk(const CrossEntropyBlock& block) : block(block), row(block.first_row) { find_row(); }
    DFLASH_INLINE bool ends() const { return row >= block.p.rows || block.count == 0; }
    DFLASH_INLINE T* data() const { return slice + begin; }
    DFLASH_INLINE uint32_t bytes() const { return min(block.slicing.piece, block.count - begin) * sizeof(T); }

    DFLASH_INLINE void find_row() {
      for (; row < block.p.rows; row += block.clusters) {
        const RowHead head(block.p, row);
        slice = block.slice_of(head);
        if (head.weight != 0) return;
      }
    }

    DFLASH_INLINE void advance() {
      at.advance();
      begin += block.slicing.piece;
      if (begin < block.count) return;
      begin = 0;
      row += block.clusters;
      find_row();
    }
  };

  DFLASH_INLINE void load_piece(Walk& walk) const {
    if (walk.ends()) return;
    Mbarrier& full = shared.ring.full[walk.at.index];
    full.arrive_and_expect_tx(walk.bytes());
    bulk_load(shared_address(slot(walk.at)), walk.data(), walk.bytes(), full);
    walk.advance();
  }

  // One thread loads the pieces and stores them.
  DFLASH_INLINE void copy() const {
    Walk loads(*this), stores(*this);
    for (int i = 0; i < kSlots; ++i) load_piece(loads);
    for (bool is_first = true; !stores.ends(); is_first = false, stores.advance()) {
      shared.ring.empty[stores.at.index].wait(stores.at.parity);
      bulk_store(stores.data(), shared_address(slot(stores.at)), stores.bytes());
      bulk_commit_group();
      // The slot before this one is free as soon as its store has read it.
      bulk_wait_group_read<1>();
      if (!is_first) load_piece(loads);
    }
    bulk_wait_group_read<0>();
  }

  // The sums of all threads of a warp.
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

  // The sums of the row, and the target's logit. Every warp sends its sums to all blocks. The places of a row are used
  // again by the row after the next, whose sums are sent only when those of the next, and so all reads, are there.
  DFLASH_INLINE RowPart of_row(RowPart part, float& target_logit, int turn) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parity = turn % 2;
    part = of_warp(part);
    if (lane < blocks) {
      const uint32_t to = map_to_rank(shared_address(&shared.parts[parity][rank * kWarps + warp]), lane);
      write_remotely(to, part.max, part.e, part.e_d, part.d);
      write_remotely(to + 16, part.count, part.before, part.rest, target_logit);
      arrive_remotely(map_to_rank(shared_address(&shared.sums_arrived[parity]), lane));
    }
    shared.sums_arrived[parity].wait_cluster(turn / 2 % 2);
    RowPart sum;
    target_logit = -kInfinity;
    for (int i = lane; i < blocks * kWarps; i += 32) {
      const auto& [a, b] = shared.parts[parity][i].halves;
      RowPart other;
      other.max = a.x, other.e = a.y, other.e_d = a.z, other.d = a.w;
      other.count = b.x, other.before = b.y, other.rest = b.z;
      target_logit = fmaxf(target_logit, b.w);
      sum.merge(other);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      target_logit = fmaxf(target_logit, __shfl_xor_sync(~0u, target_logit, mask));
    }
    return of_warp(sum);
  }

  // Calls f(slot, index in the slice, elements of the piece) for the pieces of a row.
  template <class F>
  DFLASH_INLINE void for_each_piece(Stage<kSlots>& at, F&& f) const {
    for (int begin = 0; begin < count; begin += slicing.piece, at.advance()) {
      f(at, begin, min(slicing.piece, count - begin));
    }
  }

  DFLASH_INLINE void compute() const {
    const RowLoss<float> loss(p);
    const float no_teacher[kSize] = {};
    Stage<kSlots> at;
    int turn = 0;
    for (int row = first_row; row < p.rows; row += clusters) {
      const RowHead head(p, row);
      const bool writes = rank == 0 && threadIdx.x == 0;
      if (head.weight == 0) {
        if (writes) head.write({}, false);
        const float zeros[kSize] = {};
        T* const own = slice_of(head);
        for (int i = threadIdx.x * kSize; i < count; i += kConsumers * kSize) store(own + i, zeros, true);
        continue;
      }
      const Stage<kSlots> start = at;
      RowPart part;
      float target_logit = -kInfinity;
      for_each_piece(at, [&](auto& at, int begin, int size) {
        shared.ring.full[at.index].wait(at.parity);
        const T* const logits = slot(at);
        for (int i = threadIdx.x * kSize; i < size; i += kConsumers * kSize) {
          float x[kSize];
          load(x, logits + i, true);
          part.add<false>(loss, head.target, first + begin + i, x, no_teacher);
        }
        const int target = head.target - first - begin;
        if (0 <= target && target < size) target_logit = to_float(logits[target]);
      });
      part = of_row(part, target_logit, turn++);
      if (head.target < 0) target_logit = kNaN;
      if (writes) {
        head.write(loss.values(part, loss.softcap(target_logit), 0), part.is_argmax(head.target, target_logit));
      }
      const RowGradient<float> gradient(loss, loss.stats(part), head.target < 0 ? kNaN : head.weight);
      at = start;
      for_each_piece(at, [&](auto& at, int begin, int size) {
        T* const logits = slot(at);
        for (int i = threadIdx.x * kSize; i < size; i += kConsumers * kSize) {
          float x[kSize], g[kSize];
          load(x, logits + i, true);
          gradients<false>(g, gradient, loss.softcap, head.target, first + begin + i, x, no_teacher);
          store(logits + i, g, true);
        }
        fence_proxy_async();
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.ring.empty[at.index].arrive();
      });
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    masked_cross_entropy_sm90(const __grid_constant__ CrossEntropyParams params, const Slicing slicing) {
  extern __shared__ __align__(128) uint8_t slots[];
  __shared__ CrossEntropyShared shared;
  const CrossEntropyBlock<T> block{params, shared, slots, slicing};
  if (threadIdx.x == 0) {
    shared.ring.init(kWarps);
    for (Mbarrier& each : shared.sums_arrived) each.init(block.blocks * kWarps);
    fence_mbarrier_init();
  }
  __syncthreads();
  // No block sends anything before all blocks have their barriers.
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < kConsumers) {
    block.compute();
  } else if (threadIdx.x == kConsumers) {
    block.copy();
  }
}

int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Two slices fit in a ring, so that the next row arrives during the work on one, unless the row is too long.
int cluster_size_for(int64_t row_bytes) {
  int blocks = 1;
  while (blocks < kMaxCluster && 2 * row_bytes > int64_t(blocks) * kRingBytes) blocks *= 2;
  return blocks;
}

int64_t rounded_up(int64_t value, int64_t factor) { return (value + factor - 1) / factor * factor; }

// The slice of a block, and as few pieces as hold it, of equal size.
Slicing slicing_of(int64_t vocab, int blocks, int element_bytes) {
  const int64_t chunk = 16 / element_bytes, slice = rounded_up((vocab + blocks - 1) / blocks, chunk);
  const int64_t pieces = (slice * element_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  return {int(slice), int(rounded_up((slice + pieces - 1) / pieces, chunk))};
}

template <class T>
cudaError_t launch_rows_in_place(const CrossEntropyParams& p, cudaStream_t stream) {
  const auto kernel = masked_cross_entropy_sm90<T>;
  const int blocks = cluster_size_for(p.vocab * sizeof(T));
  LaunchShape shape{.blocks = blocks, .threads = kThreads, .shared_bytes = kRingBytes, .cluster_size = blocks};
  cudaError_t status = allow_shared_memory(kernel, kRingBytes);
  if (status != cudaSuccess) return status;
  const int resident = once_per_device(blocks, [&] {
    int clusters = 0;
    const bool is_known =
        cudaOccupancyMaxActiveClusters(&clusters, kernel, LaunchConfig(shape, stream).get()) == cudaSuccess;
    return is_known ? std::max(clusters, 1) : 1;
  });
  shape.blocks = std::min<int64_t>(p.rows, resident) * blocks;
  return launch_kernel(kernel, shape, stream, p, slicing_of(p.vocab, blocks, sizeof(T)));
}

}  // namespace
}  // namespace device

uint32_t masked_cross_entropy_sm90_misses(const CrossEntropyParams& p) {
  if (!hopper_kernels_serve() || p.pass != Pass::kInPlace || p.teacher_kind != Teacher::kNone) return kNoSuchKernel;
  // Bulk copies need rows that start and end at multiples of 16 bytes.
  const int64_t bytes = device::bytes_of(p.dtype), row_bytes = p.vocab * bytes;
  const bool is_aligned = (reinterpret_cast<uintptr_t>(p.logits) | row_bytes | p.logits_strides.outer * bytes |
                           p.logits_strides.inner * bytes) % 16 == 0;
  return (is_aligned ? 0 : kLossLayout) | (row_bytes <= device::kMaxCluster * device::kMaxSliceBytes ? 0 : kLossVocabulary);
}

const char* masked_cross_entropy_sm90(const CrossEntropyParams& p, void* stream) {
  return launch_by_dtype<float, __nv_bfloat16, __half>(p.dtype, stream, [&]<class T>(cudaStream_t stream) {
    return device::launch_rows_in_place<T>(p, stream);
  });
}

}  // namespace dflash
