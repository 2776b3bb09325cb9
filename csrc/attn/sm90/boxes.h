// The boxes in which TMA copies queries, keys, values and outputs, for Hopper's attention kernels.
#pragma once

#include "attn/plan.h"
#include "common/tensor_map.h"

namespace dflash {

constexpr int64_t kBoxColumns = 64;  // 128 bytes

// Queries and outputs are (D, H, L, B). A box is the rows of one warpgroup, at most 64: `fold` heads of each position.
inline TensorBox query_box(const AttentionParams& p, const void* data, const HeadStrides& strides, int64_t fold) {
  return {data,
          {p.head_dim, p.heads, p.q_len, p.batch},
          {1, strides.head, strides.row, strides.batch},
          {kBoxColumns, fold, 64 / fold, 1}};
}

// Keys and values are (D, L, H, B), or in pages (D, page_size, H, pages). A box is some keys of one head.
inline TensorBox key_box(const AttentionParams& p, const void* data, const HeadStrides& strides, int64_t keys) {
  const bool is_paged = p.pages.table != nullptr;
  return {data,
          {p.head_dim, is_paged ? p.pages.page_size : p.kv_len, p.kv_heads, is_paged ? p.pages.count : p.batch},
          {1, strides.row, strides.head, strides.batch},
          {kBoxColumns, keys, 1, 1}};
}

// Whether TMA can load queries, keys and values and store outputs of these layouts.
template <class Params>
bool copy_engine_serves(const Params& p) {
  return copy_engine_reads(query_box(p, p.q, p.q_strides, 1)) &&
         copy_engine_reads(query_box(p, p.out, p.out_strides, 1)) &&
         copy_engine_reads(key_box(p, p.k, p.k_strides, 1)) && copy_engine_reads(key_box(p, p.v, p.v_strides, 1));
}

}  // namespace dflash
