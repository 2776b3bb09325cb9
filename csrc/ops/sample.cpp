// Operators of the sampling family: draws, verification of drafts, and what to reveal of a canvas.
// dflash_ext/ops/{sampling,verify,reveal}.py bring tensors into the form that is expected here and document the
// semantics.
#include "sample/kernels.h"

#include <tuple>

#include "common/cpu.h"
#include "common/tensor.h"

namespace dflash {

DFLASH_CPU_KERNEL(SampleParams, sample)
DFLASH_CPU_KERNEL(VerifyParams, verify)
DFLASH_CPU_KERNEL(RevealParams, reveal)

namespace {

using OptionalTensor = std::optional<Tensor>;

void check_vocab(const char* op, int64_t vocab) {
  check(vocab > 0 && vocab < int64_t(1) << 31, op, ": a vocabulary of ", vocab, " is not supported");
}

// A thread gets at least 32 K logits. With less, waking it costs more than it saves.
int64_t grain_of(int64_t row_size) { return 1 + 32768 / (row_size + 1); }

PerRow per_row(const char* op, const char* name, const Tensor& beside, const OptionalTensor& values, double value,
               ScalarType real, int64_t rows) {
  if (values) check_tensor(op, name, *values, beside, real, {rows});
  return {optional_data<void>(values), value};
}

// One number for all rows, or a tensor with one number per row, which takes its place.
struct FilterArguments {
  double temperature, top_k, top_p, min_p;
  const OptionalTensor &temperatures, &top_ks, &top_ps, &min_ps;

  FilterParams params(const char* op, const Tensor& logits) const {
    const ScalarType real = real_of(logits);
    const int64_t rows = logits.size(0);
    return {per_row(op, "temperature", logits, temperatures, temperature, real, rows),
            per_row(op, "top_k", logits, top_ks, top_k, real, rows),
            per_row(op, "top_p", logits, top_ps, top_p, real, rows),
            per_row(op, "min_p", logits, min_ps, min_p, real, rows),
            top_ks || top_ps || min_ps || top_k > 0 || top_p < 1 || min_p > 0};
  }
};

struct PenaltyArguments {
  const OptionalTensor &counts, &bias, &tables;
  double repetition, presence, frequency;
  const OptionalTensor &repetitions, &presences, &frequencies;

  PenaltyParams params(const char* op, const Tensor& logits, int64_t vocab) const {
    const ScalarType real = real_of(logits);
    const int64_t rows = logits.size(0);
    const auto check_table = [&](const char* name, const Tensor& table, ScalarType dtype) {
      check(table.dim() == 2 && (tables || table.size(0) == rows), op, ": ", name,
            " must have a row for each row of logits");
      check_tensor(op, name, table, logits, dtype, {table.size(0), vocab});
    };
    if (counts) check_table("token_counts", *counts, ScalarType::Int);
    const bool is_shared = bias && bias->dim() == 1;
    if (is_shared) check_tensor(op, "logit_bias", *bias, logits, real, {vocab});
    if (bias && !is_shared) check_table("logit_bias", *bias, real);
    if (tables) {
      check_tensor(op, "table_rows", *tables, logits, ScalarType::Long, {rows});
      if (logits.is_cpu()) check_table_rows(op);
    }
    return {optional_data<int32_t>(counts),
            optional_data<void>(bias),
            is_shared ? 0 : vocab,
            optional_data<int64_t>(tables),
            per_row(op, "repetition_penalty", logits, repetitions, repetition, real, rows),
            per_row(op, "presence_penalty", logits, presences, presence, real, rows),
            per_row(op, "frequency_penalty", logits, frequencies, frequency, real, rows)};
  }

 private:
  void check_table_rows(const char* op) const {
    for (int64_t row = 0; row < tables->size(0); ++row) {
      const int64_t table = static_cast<const int64_t*>(tables->data_ptr())[row];
      for (const auto* given : {&counts, &bias}) {
        check(!*given || (*given)->dim() == 1 || (table >= 0 && table < (*given)->size(0)), op, ": table_rows is ", table,
              " for row ", row, ", and there is no such row of token_counts or logit_bias");
      }
    }
  }
};

SeedParams seed_params(const char* op, const Tensor& seed, const Tensor& logits) {
  const bool per_row = seed.dim() == 1 && seed.size(0) != 1;
  check_tensor(op, "seed", seed, logits, ScalarType::Long, {per_row ? logits.size(0) : 1});
  return {static_cast<const int64_t*>(seed.data_ptr()), per_row};
}

// The launchers of the kernels that serve a call on a GPU.
#ifdef DFLASH_EXT_CUDA
const char* sample_on_gpu(const SampleParams& p, void* stream) {
#ifdef DFLASH_EXT_HOPPER
  if (sample_sm90_serves(p, stream)) return sample_sm90(p, stream);
#endif
  return sample_sm80(p, stream);
}
const char* verify_on_gpu(const VerifyParams& p, void* stream) {
#ifdef DFLASH_EXT_HOPPER
  if (verify_sm90_serves(p, stream)) return verify_sm90(p, stream);
#endif
  return verify_sm80(p, stream);
}
const char* reveal_on_gpu(const RevealParams& p, void* stream) { return reveal_sm80(p, stream); }
#else
constexpr const char* kNoKernel = "this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)";
const char* sample_on_gpu(const SampleParams&, void*) { fail("sample: ", kNoKernel); }
const char* verify_on_gpu(const VerifyParams&, void*) { fail("verify: ", kNoKernel); }
const char* reveal_on_gpu(const RevealParams&, void*) { fail("reveal: ", kNoKernel); }
#endif

// ---------------------------------------------------------------------- sample

std::tuple<Tensor, Tensor> run_sample(Tensor logits, Tensor seed, double temperature, double top_k, double top_p,
                                      double min_p, OptionalTensor temperatures, OptionalTensor top_ks,
                                      OptionalTensor top_ps, OptionalTensor min_ps, OptionalTensor counts,
                                      OptionalTensor bias, OptionalTensor tables, double repetition, double presence,
                                      double frequency, OptionalTensor repetitions, OptionalTensor presences,
                                      OptionalTensor frequencies, bool confidence, double softcap) {
  constexpr const char* kOp = "sample";
  check(logits.dim() == 2, kOp, ": logits must be [N, V], they have ", logits.dim(), " dimensions");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_vocab(kOp, vocab);
  check(vocab == 1 || logits.stride(1) == 1, kOp, ": the last dimension of logits must be contiguous, its stride is ",
        logits.stride(1));
  const ScalarType real = real_of(logits);
  Tensor ids = new_empty(logits, {kSampleIds, rows}, ScalarType::Long);
  Tensor reals = new_empty(logits, {confidence ? kConfidence + 1 : kConfidence, rows}, real);

  SampleParams p{};
  p.dtype = dtype_of(kOp, "logits", logits);
  p.rows = rows;
  p.vocab = vocab;
  p.logits = logits.data_ptr();
  p.stride = logits.stride(0);
  p.penalties = PenaltyArguments{counts,    bias,        tables,    repetition, presence,
                                 frequency, repetitions, presences, frequencies}
                    .params(kOp, logits, vocab);
  p.filters = FilterArguments{temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps, min_ps}
                  .params(kOp, logits);
  p.seed = seed_params(kOp, seed, logits);
  p.confidence = confidence;
  p.softcap = softcap;
  check(softcap == 0 || !(logits.is_cpu() || p.filters.any || p.penalties.any() || confidence), kOp,
        ": a soft cap is for plain draws on a GPU");
  p.reals = reals.data_ptr();
  p.ids = static_cast<int64_t*>(ids.data_ptr());
  if (rows == 0) return {ids, reals};
  if (logits.is_cpu()) {
    run_on_cpu(sample, p, rows, grain_of(vocab));
  } else {
    const CudaScope cuda(logits);
    check_launch(kOp, sample_on_gpu(p, cuda.stream()));
  }
  return {ids, reals};
}

// ---------------------------------------------------------------------- verify

void check_drafted(const VerifyParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t k = 0; k < p.drafted && (!p.lens || k < p.lens[row]); ++k) {
      const int64_t token = p.tokens[row * p.drafted + k];
      check(token >= 0 && token < p.vocab, "verify: draft token ", token, " of row ", row, ", position ", k,
            ", is outside the vocabulary [0, ", p.vocab, ")");
    }
  }
}

std::tuple<Tensor, Tensor> run_verify(Tensor draft_tokens, Tensor target_logits, OptionalTensor draft_logits,
                                      OptionalTensor draft_pivot, OptionalTensor draft_normaliser, OptionalTensor seed,
                                      OptionalTensor uniforms, OptionalTensor draft_lens, double temperature,
                                      double top_k, double top_p, double min_p, OptionalTensor temperatures,
                                      OptionalTensor top_ks, OptionalTensor top_ps, OptionalTensor min_ps,
                                      OptionalTensor counts, OptionalTensor bias, OptionalTensor tables,
                                      double repetition, double presence, double frequency, OptionalTensor repetitions,
                                      OptionalTensor presences, OptionalTensor frequencies) {
  constexpr const char* kOp = "verify";
  check(draft_tokens.dim() == 2 && target_logits.dim() == 3, kOp, ": draft_tokens must be [B, K], target_logits "
        "[B, K + 1, V]");
  const int64_t rows = draft_tokens.size(0), drafted = draft_tokens.size(1), vocab = target_logits.size(2);
  const ScalarType real = real_of(target_logits);
  check_vocab(kOp, vocab);
  check_tensor(kOp, "draft_tokens", draft_tokens, target_logits, ScalarType::Long, {rows, drafted});
  check(same_device(target_logits, draft_tokens) && target_logits.size(0) == rows && target_logits.size(1) == drafted + 1, kOp,
        ": target_logits must be [B, K + 1, V]");
  if (draft_logits) {
    check(same_device(*draft_logits, target_logits) && draft_logits->dim() == 3 && draft_logits->size(0) == rows &&
              draft_logits->size(1) == drafted && draft_logits->size(2) == vocab &&
              draft_logits->scalar_type() == target_logits.scalar_type(),
          kOp, ": draft_logits must be [B, K, V] and of the target's dtype");
  }
  check(draft_pivot.has_value() == draft_normaliser.has_value() && (draft_logits || !draft_pivot), kOp,
        ": draft_pivot and draft_normaliser come together, and with draft_logits");
  for (const auto* given : {&draft_pivot, &draft_normaliser}) {
    if (*given) check_tensor(kOp, "draft_pivot or draft_normaliser", **given, target_logits, real, {rows, drafted});
  }
  if (uniforms) check_tensor(kOp, "uniforms", *uniforms, target_logits, ScalarType::Double, {rows, drafted + 1});
  if (draft_lens) check_tensor(kOp, "draft_lens", *draft_lens, target_logits, ScalarType::Long, {rows});
  check(seed || uniforms || (temperature == 0 && !temperatures), kOp,
        ": temperature > 0 needs random numbers, and none were given");

  Tensor accepted = new_empty(draft_tokens, {rows}, ScalarType::Long);
  Tensor next_token = new_empty(draft_tokens, {rows}, ScalarType::Long);
  VerifyParams p{};
  p.dtype = dtype_of(kOp, "target_logits", target_logits);
  p.draft = !draft_logits ? Draft::kPoint : draft_pivot ? Draft::kDescribed : Draft::kFiltered;
  p.rows = rows;
  p.drafted = drafted;
  p.vocab = vocab;
  p.tokens = static_cast<const int64_t*>(draft_tokens.data_ptr());
  p.lens = optional_data<int64_t>(draft_lens);
  p.target = target_logits.data_ptr();
  p.target_strides = row_strides(kOp, "target_logits", target_logits);
  p.draft_logits = optional_data<void>(draft_logits);
  if (draft_logits) p.draft_strides = row_strides(kOp, "draft_logits", *draft_logits);
  p.pivots = optional_data<void>(draft_pivot);
  p.normalisers = optional_data<void>(draft_normaliser);
  p.penalties = PenaltyArguments{counts,    bias,        tables,    repetition, presence,
                                 frequency, repetitions, presences, frequencies}
                    .params(kOp, target_logits, vocab);
  p.filters = FilterArguments{temperature, top_k, top_p, min_p, temperatures, top_ks, top_ps, min_ps}
                  .params(kOp, target_logits);
  if (seed) p.seed = seed_params(kOp, *seed, target_logits);
  p.uniforms = optional_data<double>(uniforms);
  p.accepted = static_cast<int64_t*>(accepted.data_ptr());
  p.next_token = static_cast<int64_t*>(next_token.data_ptr());
  if (rows == 0) return {accepted, next_token};
  if (target_logits.is_cpu()) {
    check_drafted(p);
    run_on_cpu(verify, p, rows, grain_of(vocab));
    return {accepted, next_token};
  }
  const CudaScope cuda(target_logits);
  const Tensor largest =
      new_empty(target_logits, {rows, drafted + 1, p.is_greedy() ? argmax_parts(vocab) : 0}, ScalarType::Long);
  p.largest = static_cast<uint64_t*>(largest.data_ptr());
  const Tensor verdicts = new_empty(target_logits, {rows, drafted + 1}, ScalarType::Int);
  p.verdicts = static_cast<int32_t*>(verdicts.data_ptr());
  const Tensor described = new_empty(target_logits, {2, p.draft == Draft::kFiltered ? rows * drafted : 0}, real);
  p.described_drafts = described.data_ptr();
  check_launch(kOp, verify_on_gpu(p, cuda.stream()));
  return {accepted, next_token};
}

// ---------------------------------------------------------------------- reveal

Tensor run_reveal(OptionalTensor scores, Tensor masked, OptionalTensor entropy, int64_t rule, double limit,
                  OptionalTensor limits) {
  constexpr const char* kOp = "reveal";
  check(masked.dim() == 2, kOp, ": masked must be [B, L], it has ", masked.dim(), " dimensions");
  const int64_t rows = masked.size(0), length = masked.size(1);
  bool is_double = false;
  for (const auto* given : {&scores, &entropy, &limits}) {
    is_double = is_double || (*given && (*given)->scalar_type() == ScalarType::Double);
  }
  const ScalarType real = is_double ? ScalarType::Double : ScalarType::Float;
  check_tensor(kOp, "masked", masked, masked, ScalarType::Bool, {rows, length});
  if (scores) check_tensor(kOp, "scores", *scores, masked, real, {rows, length});
  if (entropy) check_tensor(kOp, "entropy", *entropy, masked, real, {rows, length});

  RevealParams p{};
  p.rule = Reveal(rule);
  check(p.rule == Reveal::kCount || (p.rule == Reveal::kEntropyBound ? entropy : scores), kOp,
        ": the limit needs scores or entropy, which are not given");
  p.is_double = is_double;
  p.rows = rows;
  p.length = length;
  p.scores = optional_data<void>(scores);
  p.entropy = optional_data<void>(entropy);
  p.masked = static_cast<const bool*>(masked.data_ptr());
  p.limit = per_row(kOp, "limit", masked, limits, limit, real, rows);
  Tensor revealed = new_empty(masked, {rows, length}, ScalarType::Bool);
  p.revealed = static_cast<bool*>(revealed.data_ptr());
  if (rows == 0 || length == 0) return revealed;
  if (masked.is_cpu()) {
    run_on_cpu(reveal, p, rows, grain_of(16 * length));  // a position costs as much as several logits
    return revealed;
  }
  const int64_t capacity = reveal_capacity(length);
  const Tensor order = new_empty(masked, {capacity > kMaxSharedRevealCapacity ? rows * capacity : 0}, ScalarType::Int);
  if (capacity > kMaxSharedRevealCapacity) p.order = static_cast<int32_t*>(order.data_ptr());
  const CudaScope cuda(masked);
  check_launch(kOp, reveal_on_gpu(p, cuda.stream()));
  return revealed;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "sample(Tensor logits, Tensor seed, float temperature, float top_k, float top_p, float min_p, "
      "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor? token_counts, Tensor? logit_bias, "
      "Tensor? table_rows, float repetition_penalty, float presence_penalty, float frequency_penalty, "
      "Tensor? repetition_penalties, Tensor? presence_penalties, Tensor? frequency_penalties, bool confidence, "
      "float softcap=0.0) -> (Tensor ids, Tensor reals)");
  m.def(
      "verify(Tensor draft_tokens, Tensor target_logits, Tensor? draft_logits, Tensor? draft_pivot, "
      "Tensor? draft_normaliser, Tensor? seed, Tensor? uniforms, Tensor? draft_lens, float temperature, float top_k, "
      "float top_p, float min_p, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, "
      "Tensor? token_counts, Tensor? logit_bias, Tensor? table_rows, float repetition_penalty, "
      "float presence_penalty, float frequency_penalty, "
      "Tensor? repetition_penalties, Tensor? presence_penalties, Tensor? frequency_penalties) "
      "-> (Tensor accepted, Tensor next_token)");
  m.def(
      "reveal(Tensor? scores, Tensor masked, Tensor? entropy, int rule, float limit, Tensor? limits) "
      "-> Tensor revealed");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("sample", TORCH_BOX(&run_sample));
  m.impl("verify", TORCH_BOX(&run_verify));
  m.impl("reveal", TORCH_BOX(&run_reveal));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("sample", TORCH_BOX(&run_sample));
  m.impl("verify", TORCH_BOX(&run_verify));
  m.impl("reveal", TORCH_BOX(&run_reveal));
}

}  // namespace dflash
