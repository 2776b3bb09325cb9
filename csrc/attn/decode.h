// Decoding on a GPU: a few rows of queries against a cache.
#pragma once

#include "attn/plan.h"

namespace dflash {

// The rows that go through matrix products together: positions times the query heads of one key head, row r at position
// r / fold in head r % fold.
constexpr int kDecodeRows = 64;

// In exact mode a row's keys are summed in parts of this many, cut at multiples of it.
constexpr int kExactKeys = 256;

struct DecodeParams : AttentionParams {
  void* out;  // rows aligned to 4 bytes
  HeadStrides out_strides;

  // TilePlan[plan_entries * tiles_of(q_len, decode_positions)]; entry 0 serves all of the batch where plan_entries is
  // 1. The portable kernel also takes a plan whose tiles hold plan_parts of its own.
  const int32_t* plan;
  int64_t plan_entries, plan_parts;

  // A row's result depends, to the bit, on its own query and its own keys alone.
  bool exact;
};

// A key head's query heads are cut into decode_head_tiles parts of decode_fold heads; the last may have fewer.
inline int64_t decode_head_tiles(const AttentionParams& p) { return (group_of(p) + kDecodeRows - 1) / kDecodeRows; }
inline int64_t decode_fold(const AttentionParams& p) {
  return (group_of(p) + decode_head_tiles(p) - 1) / decode_head_tiles(p);
}

// Warpgroups that share a tile of Hopper's kernel: one where memory is what takes time, two where there are enough rows
// for the products to. 0: it has no tile for these shapes.
inline int64_t decode_warpgroups(const AttentionParams& p) {
  if (p.head_dim > 256 || decode_head_tiles(p) > 1) return 0;
  return p.q_len * decode_fold(p) > kDecodeRows && p.head_dim > 64 ? 2 : 1;
}

// The positions of a tile.
inline int64_t decode_positions(const AttentionParams& p, bool hopper) {
  const int64_t of_warpgroup = kDecodeRows / decode_fold(p);
  return hopper && decode_warpgroups(p) == 2 ? 2 * of_warpgroup : of_warpgroup;
}

// The portable kernel's grid on a stream of the current device, and the memory that a call needs beside its tensors.
struct DecodeGrid {
  int blocks, stages, shared_bytes;
  int64_t workspace_bytes;  // they depend on shapes and `exact` only
};
const char* decode_sm80_grid(const DecodeParams& params, void* stream, DecodeGrid* grid);

// workspace: as many bytes as the grid says, aligned to 16, for this call alone; they may hold anything. Pages that the
// block table lacks are read as zeros.
const char* decode_sm80(const DecodeParams& params, const DecodeGrid& grid, void* workspace, void* stream);

#if defined(DFLASH_EXT_HOPPER) || defined(__CUDACC__)
// The kernel for Hopper, which needs no workspace; why it does not serve this call (PortableReason).
uint32_t decode_sm90_misses(const DecodeParams& params);
const char* decode_sm90(const DecodeParams& params, void* stream);
#endif

}  // namespace dflash
