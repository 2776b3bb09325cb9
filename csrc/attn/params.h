// The parameters of all attention kernels, CPU and GPU. They are plain data, so that kernels include no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

// Element (b, h, i, d) of a [B, H, L, D] tensor lies at b * batch + h * head + i * row + d.
struct HeadStrides {
  int64_t batch = 0, head = 0, row = 0;
};

// Whether every row of 16-bit elements begins at a multiple of 16 bytes.
inline bool rows_are_aligned(const void* data, const HeadStrides& strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (strides.batch | strides.head | strides.row) % 8 == 0;
}

// Row i of batch entry b sees the keys of [ctx_lo, ctx_hi) and of [blk_lo, blk_hi), which lie at b * batch + i. `batch`
// is 0 if one mask serves all batch entries. Bounds outside [0, kv_len] are clamped to it.
struct Intervals {
  const int32_t *ctx_lo, *ctx_hi, *blk_lo, *blk_hi;
  int64_t batch;
};

// A cache in pages (a PagedAttention block table): position j of batch entry b is row j % page_size of page
// table[b * max_pages + j / page_size]. strides.batch of the caches is the stride from page to page.
struct Pages {
  const int32_t* table;  // null: contiguous caches
  int64_t max_pages, page_size, count;
  bool* missing;  // becomes true if a row sees a key whose entry in the table is no page
};

// `Real` below is float, or double where q is double.
struct AttentionParams {
  DType dtype;
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim;
  double scale;
  double softcap;  // 0: none
  Intervals mask;
  const void *q, *k, *v;
  HeadStrides q_strides, k_strides, v_strides;
  Pages pages;

  // CPU only.
  void* scratch;   // forward_scratch or backward_scratch numbers of Real for every thread
  int64_t* taken;  // how many items the threads have taken; 0 at first
};

struct AttentionForwardParams : AttentionParams {
  void* out;
  HeadStrides out_strides;
  void* lse;  // [B, Hq, Lq] Real; null: not returned

  // GPU only: the mask's plan, TilePlan[plan_entries * tiles_of(q_len, positions of a tile)]. With plan_entries 1 it
  // serves the whole batch. A portable kernel also takes a plan whose tiles are plan_parts times as large as its own.
  const int32_t* plan;
  int64_t plan_entries, plan_parts;

  // CPU decoding: with splits > 1 the keys are cut at multiples of split_len, and the parts are combined afterwards.
  int64_t splits, split_len;
  void* partial_out;    // [splits, B, Hq, Lq, D] Real: sums of exp(score - maximum) * value
  void* partial_stats;  // [splits, B, Hq, Lq, 2] Real: the maximum (-inf: no key was seen), the sum of exponentials
};

struct AttentionBackwardParams : AttentionParams {
  const void *out, *lse;  // of the forward
  HeadStrides out_strides;
  const void* grad_out;
  HeadStrides grad_out_strides;
  const void* grad_lse;  // [B, Hq, Lq] Real; null: zeros

  // CPU only: the rows of a key head are cut into splits. Each split sums its own gradients of the keys, which are
  // added up afterwards.
  int64_t splits;
  void* partial;  // [splits, B, Hkv, 2, padded(kv_len), padded(head_dim)] Real: of K, of V
  void *grad_q, *grad_k, *grad_v;
  HeadStrides grad_q_strides, grad_k_strides, grad_v_strides;
};

// GQA packing on the CPU: the rows of a key head are those of all its query heads, position by position. Row r stands
// at position r / group in query head kv_head * group + r % group. A tile is kRowTile rows against kKeyTile keys.
constexpr int64_t kRowTile = 128;
constexpr int64_t kKeyTile = 64;
constexpr int64_t kMaxHeadDim = 512;

inline int64_t group_of(const AttentionParams& p) { return p.heads / p.kv_heads; }
inline int64_t rows_of(const AttentionParams& p) { return p.q_len * group_of(p); }
inline int64_t row_tiles_of(const AttentionParams& p) { return (rows_of(p) + kRowTile - 1) / kRowTile; }

// Gradients of keys are summed in whole register blocks and key tiles, for every instruction set alike.
constexpr int64_t padded(int64_t length) { return (length + kKeyTile - 1) / kKeyTile * kKeyTile; }

// How many numbers of Real one thread needs, in whole cache lines: tiles of rows and keys, and their scores.
constexpr int64_t kPanel = 32;  // at least the width of a register block
constexpr int64_t forward_scratch(int64_t head_dim) {
  return (2 * kRowTile + 3 * kKeyTile + 1) * padded(head_dim) + kKeyTile * kPanel;
}
constexpr int64_t backward_scratch(int64_t head_dim) {
  return (5 * kRowTile + 2 * kKeyTile) * padded(head_dim) + 2 * kKeyTile * kPanel + 2 * kRowTile;
}

}  // namespace dflash
