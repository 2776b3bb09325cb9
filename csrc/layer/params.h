// The parameters of the kernels between the matrix products of a transformer layer. They are plain data, so that the
// kernels include no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

// `Real` below is float, or double where the rows are double.

// residual += update, or its norm; out = the norm of residual. All rows are [rows, width] and contiguous.
struct AddRmsNormParams {
  DType dtype;
  int64_t rows, width;
  void* residual;
  const void* update;       // null: nothing is added, and `out` is the norm of `residual`
  const void* update_norm;  // [width] of dtype: the weight of the update's own norm; null: it has none
  const void* norm;         // [width] of dtype
  void* out;
  double eps;
  bool plus_one;  // the norms multiply by 1 + weight
};

// Heads of one dtype: head h of row r of entry b starts at base + b * entry + h * head + r * row.
struct HeadRows {
  void* base;
  int64_t entry, head, row;
};

// Queries and keys get their norms and their rotary embedding; keys and values go to the cache.
struct RotateToCacheParams {
  DType dtype;
  int64_t entries, rows, heads, kv_heads, head_dim;
  const void* projected;          // [entries, rows, heads + 2 * kv_heads, head_dim]
  const void *q_norm, *k_norm;    // [head_dim] of dtype, or null
  double eps;
  bool plus_one;
  const void *cos, *sin;          // [positions, angles] Real
  int64_t positions_count, angles;
  const int64_t* positions;       // [entries, rows]; negative: the row is padding, and its query has no meaning
  const int64_t* places;          // [entries, rows], where in its cache a row goes; negative: nowhere
  const int32_t* caches;          // [entries]: which cache an entry's rows go to
  int64_t cache_count, capacity;
  HeadRows queries, keys, values;
};

// out = activation(gate) * up, of gate_up [rows, 2 * width]: gate, then up.
enum class Activation { kSilu, kGeluTanh };
struct GatedParams {
  DType dtype;
  int64_t rows, width;
  Activation activation;
  const void* gate_up;
  void* out;
};

const char* add_rms_norm_sm80(const AddRmsNormParams& params, void* stream);
const char* rotate_to_cache_sm80(const RotateToCacheParams& params, void* stream);
const char* gated_sm80(const GatedParams& params, void* stream);

}  // namespace dflash
