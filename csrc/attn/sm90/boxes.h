// What the copy engine brings at a time, for Hopper's attention kernels.
#pragma once

#include "attn/plan.h"
#include "common/tensor_map.h"

namespace dflash {

constexpr int64_t kBoxColumns = 64;  // 128 bytes

// Of queries and outputs, (D, H, L, B): the rows of one warpgroup, at most 64, `fold` heads of each position.
inline TensorBox query_box(const AttentionParams& p, const void* data, const HeadStrides& strides, int64_t fold) {
  return {data,
          {p.head_dim, p.heads, p.q_len, p.batch},
          {1, strides.head, strides.row, strides.batch},
          {kBoxColumns, fold, 64 / fold, 1}};
}

// Of keys and values, (D, L, H, B); in pages (D, page_size, H, pages).
inline TensorBox key_box(const AttentionParams& p, const void* data, const HeadStrides& strides, int64_t keys) {
  const bool is_paged = p.pages.table != nullptr;
  return {data,
          {p.head_dim, is_paged ? p.pages.page_size : p.kv_len, p.kv_heads, is_paged ? p.pages.count : p.batch},
          {1, strides.row, strides.head, strides.batch},
          {kBoxColumns, keys, 1, 1}};
}

// The copy engine reads queries, keys and values, and stores outputs, as they lie.
template <class Params>
bool copy_engine_serves(const Params& p) {
  return copy_engine_reads(query_box(p, p.q, p.q_strides, 1)) &&
         copy_engine_reads(query_box(p, p.out, p.out_strides, 1)) &&
         copy_engine_reads(key_box(p, p.k, p.k_strides, 1)) && copy_engine_reads(key_box(p, p.v, p.v_strides, 1));
}

}  // namespace dflash
