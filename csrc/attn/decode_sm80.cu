// Decode attention on any GPU since Ampere, with mma.sync, ldmatrix and cp.async: few rows, many keys, bound by the
// memory that the cache lies in.
//
// A persistent grid works through the list of sm80/decode_work.h. Every block takes an equal range of it. Key tiles
// stream through a ring in shared memory that runs on from one item into the next. Each warp has 16 of a tile's 64
// rows, and keeps their output in registers (sm80/decoder.h). An item that several blocks share is combined by all of
// them (sm80/decode_combine.h).
#include <algorithm>
#include <bit>

#include "attn/kernels.h"
#include "attn/sm80/decoder.h"
#include "common/dispatch.h"

namespace dflash {
namespace device::sm80 {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(DecodeTiling<kDim>::kThreads, DecodeTiling<kDim>::kBlocks)
    block_attn_decode_sm80(const __grid_constant__ DecodeProblem problem) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Decoder<T, kDim>(problem, memory).run();
}

int64_t plan_tiles_of(const DecodeParams& p) {
  return p.plan_entries * tiles_of(p.q_len, p.plan_parts * decode_positions(p, false));
}

int64_t replicas_of(const DecodeParams& p) {
  return (p.plan_entries == 1 ? p.batch : 1) * p.kv_heads * p.plan_parts * decode_head_tiles(p);
}

int64_t slots_of(const DecodeParams& p, int64_t blocks) {
  if (!p.exact) return 2 * blocks;
  return plan_tiles_of(p) * replicas_of(p) * std::max<int64_t>((p.kv_len + kExactKeys - 1) / kExactKeys, 1);
}

int64_t counter_bytes(int64_t blocks) { return (blocks * sizeof(uint32_t) + 15) / 16 * 16; }

// The grid has as many blocks as are resident at once, and their rings as many stages as shared memory holds.
template <class T, int kDim>
cudaError_t fit(const DecodeParams& p, cudaStream_t stream, DecodeGrid* grid) {
  using Tile = DecodeTiling<kDim>;
  constexpr int kFixedBytes = Tile::kQueryBytes + sizeof(DecodeShared<Tile>);
  const int per_processor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int per_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int reserved = device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  for (int resident = Tile::kBlocks; resident > 0; --resident) {
    const int available = std::min(per_block, per_processor / resident - reserved) - kFixedBytes;
    grid->stages = std::min(available / Tile::kStageBytes, kMaxStages);
    if (grid->stages > 1) break;
  }
  if (grid->stages < 1) return cudaErrorInvalidConfiguration;
  grid->shared_bytes = kFixedBytes + grid->stages * Tile::kStageBytes;
  const cudaError_t status =
      count_resident_blocks(block_attn_decode_sm80<T, kDim>, Tile::kThreads, grid->shared_bytes, stream, &grid->blocks);
  if (status == cudaSuccess && grid->blocks < 1) return cudaErrorInvalidConfiguration;
  grid->workspace_bytes = counter_bytes(grid->blocks) +
                          slots_of(p, grid->blocks) * kDecodeRows * (p.head_dim + 2) * int64_t(sizeof(float));
  return status;
}

template <class T, int kDim>
cudaError_t launch_decode(const DecodeParams& params, const DecodeGrid& grid, void* workspace, cudaStream_t stream) {
  using Tile = DecodeTiling<kDim>;
  DecodeProblem problem{params};
  problem.tiles = static_cast<int>(plan_tiles_of(params));
  problem.replicas = static_cast<int>(replicas_of(params));
  problem.parts = static_cast<int>(params.plan_parts);
  problem.head_tiles = static_cast<int>(decode_head_tiles(params));
  problem.fold = static_cast<int>(decode_fold(params));
  problem.fragments = static_cast<int>(params.head_dim / 8);
  problem.positions = static_cast<int>(decode_positions(params, false));
  problem.unit_shift = std::countr_zero(static_cast<unsigned>(params.exact ? kExactKeys : Tile::kKeys));
  problem.stages = grid.stages;
  problem.q_aligned = rows_are_aligned(params.q, params.q_strides);
  problem.kv_aligned = rows_are_aligned(params.k, params.k_strides) && rows_are_aligned(params.v, params.v_strides);
  problem.counters = static_cast<uint32_t*>(workspace);
  problem.partial_out = reinterpret_cast<float4*>(static_cast<char*>(workspace) + counter_bytes(grid.blocks));
  const int64_t rows = slots_of(params, grid.blocks) * kDecodeRows;
  problem.partial_stats = reinterpret_cast<float2*>(problem.partial_out + rows * params.head_dim / 4);
  LaunchShape shape{grid.blocks, Tile::kThreads, grid.shared_bytes};
  shape.is_cooperative = true;
  return launch_kernel(block_attn_decode_sm80<T, kDim>, shape, stream, problem);
}

}  // namespace
}  // namespace device::sm80

const char* decode_sm80_grid(const DecodeParams& p, void* stream, DecodeGrid* grid) {
  return launch_by_dtype_and_head_dim(p.dtype, p.head_dim, stream, [&]<class T, int kDim>(cudaStream_t stream) {
    return device::sm80::fit<T, kDim>(p, stream, grid);
  });
}

const char* decode_sm80(const DecodeParams& p, const DecodeGrid& grid, void* workspace, void* stream) {
  return launch_by_dtype_and_head_dim(p.dtype, p.head_dim, stream, [&]<class T, int kDim>(cudaStream_t stream) {
    return device::sm80::launch_decode<T, kDim>(p, grid, workspace, stream);
  });
}

}  // namespace dflash
