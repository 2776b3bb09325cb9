// Decoding on a GPU: a few rows of queries against a cache.
#pragma once

#include "attn/plan.h"

namespace dflash {

// The rows that go through matrix products together: positions times the query heads of one key head, row r at position
// r / fold in head r % fold.
constexpr int kDecodeRows = 64;

// In exact mode a row's keys are summed in parts of this many, cut at multiples of it.
constexpr int kExactKeys = 256;

// Each block of the grid has one.
constexpr int64_t kDecodeCounters = 4096;

struct DecodeParams : AttentionParams {
  void* out;  // rows aligned to 4 bytes
  HeadStrides out_strides;

  // TilePlan[plan_entries * tiles_of(q_len, decode_positions)]; entry 0 serves all of the batch where plan_entries is
  // 1.
  const int32_t* plan;
  int64_t plan_entries;

  // A row's result depends, to the bit, on its own query and its own keys alone.
  bool exact;

  // One call at a time may use these.
  int32_t* counters;  // [kDecodeCounters]: zero before the first call; every call leaves them so
  void* workspace;    // decode_workspace(params) bytes, aligned to 16; nothing in them outlives a call
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

// Bytes of workspace on the current device; they depend on shapes and `exact` only.
int64_t decode_workspace(const DecodeParams& params);

// Pages that the block table lacks are read as zeros.
const char* decode_sm80(const DecodeParams& params, void* stream);

#if defined(DFLASH_EXT_HOPPER) || defined(__CUDACC__)
// On Hopper: whether the kernel serves this call on the current device. It uses neither counters nor workspace.
bool decode_sm90_serves(const DecodeParams& params);
const char* decode_sm90(const DecodeParams& params, void* stream);
#endif

}  // namespace dflash
