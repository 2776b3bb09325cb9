// The parameters of the kernels between the matrix products of a transformer layer. They are plain data, so that the
// kernels include no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

// `Real` below is float, or double where the rows are double.

// total = residual + update, or its norm; out = the norm of total. All rows are [rows, width] and contiguous, but that
// those of `update` start `update_stride` elements apart.
struct AddRmsNormParams {
  DType dtype;
  int64_t rows, width, update_stride;
  const void* residual;
  void* total;              // where the sum goes, which may be `residual`
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
  const void* projected;          // [entries, rows, heads + 2 * kv_heads, head_dim]; rows are `stride` elements apart
  int64_t stride;
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

// out = activation(gate) * up. Rows of gate and up start `stride` elements apart, those of out `width`.
enum class Activation { kSilu, kGeluTanh };
struct GatedParams {
  DType dtype;
  int64_t rows, width, stride;
  Activation activation;
  const void *gate, *up;
  void* out;
};

// product[r, c] += sum over i of inner[r, inner_at + i] * halves[c, i], in rows that have an adapter: of the `entry_rows`
// rows of an entry, those from `first` on. Columns up to ends[0], ends[1] and all others have inner_at[0], [1] and [2].
// Blocks read `halves` while the previous kernel runs.
struct AddHalvesParams {
  DType dtype;
  int64_t rows, entry_rows, first, width, rank;
  void* product;  // [rows, width], rows `stride` elements apart
  int64_t stride;
  const void* inner;  // rows `inner_stride` elements apart
  int64_t inner_stride;
  const void* halves;  // [width, rank]
  int64_t ends[2], inner_at[3];
  Activation activation;
  void* out;  // null, or [rows, width / 2] for activation(gate) * up of the sums, which `product` does not get then
};

// The gradients of gate and up from that of the result. They take its place and that of the result.
struct GatedBackwardParams {
  DType dtype;
  int64_t count;
  Activation activation;
  const void *gate, *up;
  void* grad;   // in: the result's gradient; out: the gate's
  void* other;  // out: the up projection's
};

// The gradients of an RMS norm. Rows are [rows, width] and contiguous. Row r belongs to part r % parts.
struct RmsNormBackwardParams {
  DType dtype;
  int64_t rows, width, parts;
  const void *x, *weight;
  const void* grad;        // of the norm
  const void* grad_total;  // another gradient of x, which is added; null for none
  void* grad_x;
  void* grad_weight;       // [parts, width] Real: the sums over the rows of each part
  double eps;
};

// The norm of every head, rotated: x and out are [rows, heads, head_dim], contiguous. The angles' cosines and sines are
// [rows, head_dim / 2] Real, with rows `table_stride` apart.
struct RotateHeadsParams {
  DType dtype;
  int64_t rows, heads, head_dim;
  const void *x, *weight;  // weight: [head_dim] Real
  const void *cos, *sin;
  int64_t table_stride;
  void* out;
  double eps;
};

// The gradients of the same. Head h belongs to part h % parts, counted over the heads of all rows.
struct RotateHeadsBackwardParams {
  RotateHeadsParams forward;  // `out` is null
  const void* grad;
  void* grad_x;
  int64_t parts;
  void* grad_weight;  // [parts, head_dim] Real
};

const char* add_rms_norm_sm80(const AddRmsNormParams& params, void* stream);
const char* rotate_to_cache_sm80(const RotateToCacheParams& params, void* stream);
const char* gated_sm80(const GatedParams& params, void* stream);
const char* add_halves_sm80(const AddHalvesParams& params, void* stream);
const char* gated_backward_sm80(const GatedBackwardParams& params, void* stream);
const char* rms_norm_backward_sm80(const RmsNormBackwardParams& params, void* stream);
const char* rotate_heads_sm80(const RotateHeadsParams& params, void* stream);
const char* rotate_heads_backward_sm80(const RotateHeadsBackwardParams& params, void* stream);

}  // namespace dflash
