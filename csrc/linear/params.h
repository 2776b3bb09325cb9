// The parameters of the linear kernels. They are plain data, so that kernels include no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

enum class Gate { kNone, kSilu, kGelu };  // kGelu is the form with tanh

// out = f(normalised(x) @ weight^T + bias) + residual. With a gate the weight has 2 * columns rows, and
// f(y) = activation(y[:columns]) * y[columns:].
//
// `Real` below is float, or double where x is double. Everything else is of x's dtype, but for the weight of a float32
// x on the CPU, which may be bfloat16.
struct LinearParams {
  DType dtype, weight_dtype;
  int64_t rows, inner, columns;  // columns of out
  const void* x;                 // [rows, inner]
  const void* weight;            // [columns or 2 * columns, inner]
  const void* bias;              // [columns or 2 * columns], or null
  const void* norm;              // [inner], the weights of an RMS norm, or null
  double norm_eps;
  bool norm_plus_one;
  Gate gate;
  const void* residual;  // [rows, columns], or null
  void* out;             // [rows, columns]
  bool weight_is_constant;  // a GPU may read it while the kernel before this one still runs
};

// The CPU kernel's unit of work: neighbouring columns of out.
constexpr int kLinearPanel = 48;

}  // namespace dflash
