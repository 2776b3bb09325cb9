// The parameters of the kernel. They are plain data, so that the kernel includes no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

// One layer's keys or values: the entry of a head at a slot starts at
// base + outer * (batch row or page) + head * (head) + slot * (slot in the row or page).
struct KvCache {
  void* base;
  int64_t outer, head, slot;
};

// `Real` below is float, or double where the projections are double; then the caches are double, too. On a GPU bias and
// k_norm may also be of a 16-bit dtype.
struct KvWriteParams {
  DType dtype, cache_dtype;
  int64_t tokens, length, layers, heads, head_dim;  // tokens = batch * length
  const void* projected;                            // [tokens, layers, 2, heads, head_dim]: K and V
  const void* bias;                                 // [layers, 2, heads, head_dim] Real, or null
  const void* k_norm;                               // [layers, head_dim] Real, or null
  DType bias_dtype, k_norm_dtype;
  double norm_eps;
  bool norm_plus_one, norm_after_rope, v_norm;

  const void *cos, *sin;      // [positions, angles] Real, or [layers, positions, angles]
  int64_t table_length;       // positions
  int64_t angles, by_layer;   // elements from one layer's table to the next: 0 if they share it
  bool rope_interleaved;
  const int64_t* positions;   // [tokens]

  const int64_t* slots;        // [tokens]; negative: not written
  const int32_t* block_table;  // [batch, max_pages]; null: contiguous caches
  int64_t max_pages, page_size;
  int64_t capacity, pages;  // slots of a row; pages, if there are any
  const KvCache *k_caches, *v_caches;  // [layers]
};

}  // namespace dflash
