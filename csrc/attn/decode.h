// Decoding on a GPU: a few rows of queries against a cache.
#pragma once

#include "attn/plan.h"

namespace dflash {

// The rows that share matrix products: positions times the query heads of one key head (GQA packing). Row r stands at
// position r / fold in head r % fold.
constexpr int kDecodeRows = 64;

// In exact mode a row's keys are summed in parts of this many keys, cut at multiples of this number.
constexpr int kExactKeys = 256;

// The largest head dimension of the Hopper kernel.
constexpr int64_t kMostDecodeDim = 256;

struct DecodeParams : AttentionParams {
  void* out;  // rows aligned to 4 bytes
  HeadStrides out_strides;

  // TilePlan[plan_entries * tiles_of(q_len, decode_positions)]. With plan_entries 1 it serves the whole batch. A plan may
  // also have tiles that are plan_parts times as large as the kernel's own.
  const int32_t* plan;
  int64_t plan_entries, plan_parts;

  // Exact mode: the bits of a row's result depend only on its own query and its own keys.
  bool exact;

  // No kernel that may still run when this one starts writes the plan, the mask, the block table, or keys and values that
  // lie q_len places or more before the end of what a row sees. The Hopper kernel then loads these keys before the
  // previous kernel has ended.
  bool context_is_constant;
};

// The query heads of a key head are cut into decode_head_tiles tiles of decode_fold heads; the last may have fewer.
inline int64_t decode_head_tiles(const AttentionParams& p) { return (group_of(p) + kDecodeRows - 1) / kDecodeRows; }
inline int64_t decode_fold(const AttentionParams& p) {
  return (group_of(p) + decode_head_tiles(p) - 1) / decode_head_tiles(p);
}

// How many consumer warpgroups share a tile of the Hopper kernel: one where memory is the limit, two where there are
// enough rows for the products to be, which exact mode does not look at. 0 means that the kernel has no tile for these
// shapes.
inline int64_t decode_warpgroups(const AttentionParams& p, bool exact = false) {
  if (p.head_dim > kMostDecodeDim || decode_head_tiles(p) > 1) return 0;
  return p.q_len * decode_fold(p) > kDecodeRows && p.head_dim > 64 && !exact ? 2 : 1;
}

// The positions of a tile of rows.
inline int64_t decode_positions(const AttentionParams& p, bool hopper, bool exact = false) {
  const int64_t of_warpgroup = kDecodeRows / decode_fold(p);
  return hopper && decode_warpgroups(p, exact) == 2 ? 2 * of_warpgroup : of_warpgroup;
}

// The portable kernel's grid on a stream of the current device, and its workspace. They depend only on shapes and on
// `exact`.
struct DecodeGrid {
  int blocks, stages, shared_bytes;
  int64_t workspace_bytes;
};
const char* decode_sm80_grid(const DecodeParams& params, void* stream, DecodeGrid* grid);

// The workspace is grid.workspace_bytes bytes for this call alone, aligned to 16; they may hold anything. Pages that
// the block table lacks are read as zeros.
const char* decode_sm80(const DecodeParams& params, const DecodeGrid& grid, void* workspace, void* stream);

#if defined(DFLASH_EXT_HOPPER) || defined(__CUDACC__)
// The Hopper kernel, which needs no workspace, and why it does not serve a call (PortableReason).
uint32_t decode_sm90_misses(const DecodeParams& params);
const char* decode_sm90(const DecodeParams& params, void* stream);
#endif

}  // namespace dflash
