// The parameters of the sampling kernels. They are plain data, so that kernels include no torch header.
#pragma once

#include <cstdint>

#include "common/layout.h"

namespace dflash {

// `Real` below is float, or double where the logits are double.

// One number for all rows, or one number per row.
struct PerRow {
  const void* values;  // [rows] Real; null: `value` for all
  double value;
};

// The distribution of a row is softmax(logits / temperature), after the filters top-k, top-p and min-p.
struct FilterParams {
  PerRow temperature, top_k, top_p, min_p;  // off: top_k 0, top_p 1, min_p 0; temperature 0: the argmax alone
  bool any;                                 // top_k, top_p or min_p is given
};

// What changes logits before the temperature: a bias, and penalties for the tokens that a row has already. Both are in
// tables of [tables, vocab]; row n has the table tables[n].
struct PenaltyParams {
  const int32_t* counts;  // how often the row has each token, -1 if in its prompt alone; null: no penalties
  const void* bias;       // Real; null: none
  int64_t bias_stride;    // vocab, or 0 where all rows have one bias
  const int64_t* tables;  // [rows]; null: row n has table n
  PerRow repetition, presence, frequency;

  bool any() const { return counts != nullptr || bias != nullptr; }
};

struct SeedParams {
  const int64_t* values;
  bool per_row;  // values [rows]; otherwise [1]
};

// Rows of SampleParams::reals and ::ids. The last real exists only if `confidence` is set.
enum SampleReal { kProb, kLogprob, kEntropy, kMargin, kMaxProb, kPivot, kNormaliser, kFilteredEntropy, kConfidence };
enum SampleId { kToken, kArgmax, kSampleIds };

struct SampleParams {
  DType dtype;
  int64_t rows, vocab;
  const void* logits;  // [rows, vocab]
  int64_t stride;
  PenaltyParams penalties;
  FilterParams filters;
  SeedParams seed;
  bool confidence;
  double softcap;  // logits are softcap * tanh(logits / softcap); 0: none. It goes with none of the options above
  void* reals;   // [kConfidence, rows] Real, or one row more with `confidence`
  int64_t* ids;  // [kSampleIds, rows]
};

enum class Draft { kPoint, kFiltered, kDescribed };

struct VerifyParams {
  DType dtype;
  Draft draft;  // a point mass; logits, whose filters are applied again; logits with their pivot and normaliser
  int64_t rows, drafted, vocab;
  const int64_t* tokens;       // [rows, drafted]
  const int64_t* lens;         // [rows]; null: all `drafted`
  const void* target;          // [rows, drafted + 1, vocab]
  const void* draft_logits;    // [rows, drafted, vocab]; null for a point mass
  const void* pivots;          // [rows, drafted] Real, and normalisers likewise, for kDescribed
  const void* normalisers;
  RowStrides target_strides, draft_strides;
  PenaltyParams penalties;  // of the target's logits; the drafts before a position count as tokens that the row has
  FilterParams filters;
  SeedParams seed;         // where `uniforms` is null
  const double* uniforms;  // [rows, drafted + 1]
  int64_t* accepted;       // [rows]
  int64_t* next_token;     // [rows]
  // Scratch memory of the CUDA kernels.
  int32_t* verdicts;       // [rows, drafted + 1]: kAccepted, or the token to commit in the draft's place
  void* described_drafts;  // [2, rows, drafted] Real: pivots and normalisers that the kernels find, for kFiltered
  uint64_t* largest;       // [rows, drafted + 1, argmax_parts(vocab)]: the largest logits, if all rows are greedy

  // Whether the host knows that all rows are greedy.
  bool is_greedy() const { return filters.temperature.values == nullptr && filters.temperature.value == 0; }
};

constexpr int32_t kAccepted = -1;

// Greedy verification on a GPU cuts rows into parts of so many tokens.
constexpr int64_t kArgmaxPart = 8192;
constexpr int64_t argmax_parts(int64_t vocab) { return (vocab + kArgmaxPart - 1) / kArgmaxPart; }

enum class Reveal { kCount, kThreshold, kFactor, kEntropyBound, kAtLeast };

struct RevealParams {
  Reveal rule;
  bool is_double;  // Real: float or double
  int64_t rows, length;
  const void* scores;   // [rows, length] Real; null: positions are revealed from left to right
  const void* entropy;  // [rows, length] Real, for kEntropyBound
  const bool* masked;   // [rows, length]
  PerRow limit;
  bool* revealed;  // [rows, length]
  int32_t* order;  // [rows, reveal_capacity(length)], scratch memory of the CUDA kernel; null for short rows
};

// The smallest power of 2 that is not less than the length of a row.
inline int64_t reveal_capacity(int64_t length) {
  int64_t capacity = 1;
  while (capacity < length) capacity *= 2;
  return capacity;
}
constexpr int64_t kMaxSharedRevealCapacity = 16384;  // 64 KiB of shared memory

// One chunk of the vocabulary of `soft_embedding`. With z = softcap(logits) / temperature in units of log2, a row's
// weights are 2^(z - origin). The origin is the largest z of the row's first chunk. It is raised, and what was summed is
// scaled, when a later z is so much larger that weights could overflow.
struct ScaledExpParams {
  DType dtype, weight_dtype;
  int64_t rows, begin, count, width;  // the chunk is logits[:, begin:begin + count]; width: of the embeddings
  const void* logits;
  int64_t stride;
  PerRow temperature;
  double softcap;   // 0: none
  void* weights;    // [rows, count]
  float* origins;   // [rows]
  float* sums;      // [rows], of the weights as they are stored
  float* embedded;  // [rows, width], the sum of weights times embeddings so far
};

// A draw without filters and penalties from bfloat16 logits, and the weights of all of the vocabulary, as above but with
// an origin of their own. The vocabulary is a multiple of 8, and rows of logits are aligned to 16 bytes.
struct WeightedDrawParams {
  SampleParams draw;
  void* weights;  // [rows, vocab] bfloat16
  float* sums;    // [rows], of the weights as they are stored
};

}  // namespace dflash
