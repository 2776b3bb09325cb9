// What the operators tell the kernels. Plain data: no torch header reaches a kernel.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

// Element (b, h, i, d) of a [B, H, L, D] tensor lies at b * batch + h * head + i * row + d.
struct HeadStrides {
  int64_t batch = 0, head = 0, row = 0;
};

// Row i of batch entry b sees the keys of [ctx_lo, ctx_hi) and of [blk_lo, blk_hi), read at b * batch + i; batch is 0
// where one mask serves all entries. Bounds beyond [0, kv_len] mean its ends.
struct Intervals {
  const int32_t *ctx_lo, *ctx_hi, *blk_lo, *blk_hi;
  int64_t batch;
};

// A cache in pages: position j of batch entry b is row j % page_size of page table[b * max_pages + j / page_size], and
// the caches' strides.batch leads from page to page.
struct Pages {
  const int32_t* table;  // null: no pages
  int64_t max_pages, page_size, count;
  bool* missing;  // set when a row sees a key whose entry is no page
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

  void* scratch;   // for every thread as much as the kernel's scratch function says
  int64_t* taken;  // how many items of work the threads have taken; 0 at first
};

struct AttentionForwardParams : AttentionParams {
  void* out;
  HeadStrides out_strides;
  void* lse;  // [B, Hq, Lq] Real; null: not wanted

  // On a GPU: the mask's plan, TilePlan[plan_entries * tiles_of(q_len, positions of a tile)]; entry 0 serves all of the
  // batch where plan_entries is 1. The portable kernel also takes a plan whose tiles hold plan_parts of its own.
  const int32_t* plan;
  int64_t plan_entries, plan_parts;

  // With splits > 1 the keys are cut at multiples of split_len, and what each part yields is combined afterwards.
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

  // The rows of a key head are cut into splits; each sums its share of the keys' gradients.
  int64_t splits;
  void* partial;  // [splits, B, Hkv, 2, padded(kv_len), padded(head_dim)] Real: of K, of V
  void *grad_q, *grad_k, *grad_v;
  HeadStrides grad_q_strides, grad_k_strides, grad_v_strides;
};

// The rows of a key head are the rows of all its query heads, position by position: row r stands at position
// r / group in query head kv_head * group + r % group. Tiles are kRowTile of them against kKeyTile keys.
constexpr int64_t kRowTile = 128;
constexpr int64_t kKeyTile = 64;
constexpr int64_t kMaxHeadDim = 512;

inline int64_t group_of(const AttentionParams& p) { return p.heads / p.kv_heads; }
inline int64_t rows_of(const AttentionParams& p) { return p.q_len * group_of(p); }
inline int64_t row_tiles_of(const AttentionParams& p) { return (rows_of(p) + kRowTile - 1) / kRowTile; }

// Gradients of keys are summed in whole register blocks and key tiles, whatever the instruction set.
constexpr int64_t padded(int64_t length) { return (length + kKeyTile - 1) / kKeyTile * kKeyTile; }

// Numbers of Real that one thread needs, whole cache lines: tiles of rows and of keys, and what lies between them.
constexpr int64_t kPanel = 32;  // at least the width of a register block
constexpr int64_t forward_scratch(int64_t head_dim) {
  return (2 * kRowTile + 3 * kKeyTile + 1) * padded(head_dim) + kKeyTile * kPanel;
}
constexpr int64_t backward_scratch(int64_t head_dim) {
  return (5 * kRowTile + 2 * kKeyTile) * padded(head_dim) + 2 * kKeyTile * kPanel + 2 * kRowTile;
}

}  // namespace dflash
