// The parameters of the loss kernels. They are plain data, so that kernels include no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

enum class Teacher { kNone, kKL, kTV };
enum class Pass {
  kForward,   // logits -> losses and stats
  kBackward,  // logits, stats, grad_losses -> grad
  kInPlace,   // logits -> losses, and logits become d(row_loss)/d(logits)
};

// How many numbers per row the forward hands to the backward (RowStats in row.h).
constexpr int kNumStats = 5;

// `Real` below is float, or double where the logits are double.
struct CrossEntropyParams {
  Pass pass;
  DType dtype;
  Teacher teacher_kind;
  int64_t rows, inner, vocab;

  const void* logits;   // [rows, vocab]
  const void* teacher;  // [rows, vocab], of the logits' dtype
  void* grad;           // [rows, vocab], of the logits' dtype; the logits themselves for kInPlace
  RowStrides logits_strides, teacher_strides, grad_strides;

  const int64_t* target;    // [rows]
  const void* weight;       // [rows] Real; null: all ones. Rows of weight 0 are skipped
  const void* grad_losses;  // [rows] Real, for kBackward

  void* losses;   // [rows] Real: weight * loss
  void* nll;      // [rows] Real
  void* entropy;  // [rows] Real
  void* stats;    // [rows, kNumStats] Real; not used by kInPlace
  bool* correct;  // [rows]

  double softcap;  // 0: none
  double label_smoothing, z_loss, teacher_mix;
};

}  // namespace dflash
