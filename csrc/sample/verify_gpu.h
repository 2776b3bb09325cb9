// The kernels of `verify` on a GPU. A team of blocks decides on one position of a draft as if all before it were
// accepted, and finds the token that takes its place if it is not. A last, small kernel finds where each draft ends.
#pragma once

#include "common/launch.h"
#include "sample/pivot_gpu.h"
#include "sample/random.h"

namespace dflash::DFLASH_ISA {

constexpr int kVerifyBlocks = 1;  // of a multiprocessor; it bounds the registers

DFLASH_INLINE int64_t drafted_of(const VerifyParams& p, int64_t row) {
  return p.lens ? max(int64_t(0), min(p.lens[row], p.drafted)) : p.drafted;
}

template <class T>
DFLASH_INLINE const T* position_of(const void* logits, const RowStrides& strides, int64_t row, int64_t k) {
  return static_cast<const T*>(logits) + row * strides.outer + k * strides.inner;
}

// Finds the pivots and normalisers of draft logits. The pivot of a point mass is +inf, and its "normaliser" is the
// bits of its token.
template <class T, class Team>
__global__ void __launch_bounds__(kThreads, kVerifyBlocks) describe_drafts(const VerifyParams params) {
  __shared__ RowMemory memory;
  __shared__ PivotMemory pivot_memory;
  const int64_t n = blockIdx.x / Team::size(), row = n / params.drafted, k = n % params.drafted;
  Team::wait_for_inputs();
  const Filters<float> filters(params.filters, row);
  if (filters.temperature == 0 || k >= drafted_of(params, row)) return;
  const PlainLogits<T> logits(position_of<T>(params.draft_logits, params.draft_strides, row, k), params.vocab);
  Row<PlainLogits<T>, Team> draft(logits, filters.temperature, memory);
  draft.read(true);
  filter(draft, filters, pivot_memory);
  if (Team::rank() != 0 || warp_id() != 0) return;
  const int argmax = draft.argmax();
  float* const pivots = static_cast<float*>(params.described_drafts);
  if (lane_id() == 0) {
    pivots[n] = draft.is_certain() ? kInfinity : draft.pivot();
    pivots[params.rows * params.drafted + n] = draft.is_certain() ? __int_as_float(argmax) : draft.normaliser();
  }
}

// The distribution q of one drafted token: a point mass, or masses of logits.
template <class T>
struct DraftRow {
  static constexpr int kSize = Chunk<T>::kSize;
  const T* x = nullptr;  // null for a point mass
  uint32_t vocab = 0;
  bool aligned = false;
  int64_t point;  // the token of a point mass, if x is null
  Masses masses{};

  DFLASH_INLINE DraftRow(const VerifyParams& p, int64_t row, int64_t k, int64_t token, float temperature, bool is_bonus)
      : point(token) {
    if (p.draft == Draft::kPoint || is_bonus) return;
    const bool is_filtered = p.draft == Draft::kFiltered;
    const int64_t n = row * p.drafted + k;
    const float* const found = static_cast<const float*>(p.described_drafts);
    const float pivot = is_filtered ? found[n] : static_cast<const float*>(p.pivots)[n];
    const float normaliser =
        is_filtered ? found[p.rows * p.drafted + n] : static_cast<const float*>(p.normalisers)[n];
    if (pivot == kInfinity) {
      if (is_filtered) point = __float_as_int(normaliser);
      return;
    }
    x = position_of<T>(p.draft_logits, p.draft_strides, row, k);
    vocab = p.vocab;
    aligned = is_aligned(x);
    masses = {smallest_logit(pivot, temperature), normaliser * temperature, kLog2E / temperature, 1};
  }

  DFLASH_INLINE float probability(int64_t token) const {
    return x == nullptr ? float(token == point) : masses(to_float(x[token]));
  }
  // The masses of tokens [token, token + kSize).
  DFLASH_INLINE void operator()(float (&q)[kSize], uint32_t token, const Chunk<T>& chunk) const {
    if (x == nullptr) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) q[k] = float(int64_t(token) + k == point);
    } else {
      masses(q, chunk);
    }
  }
  DFLASH_INLINE Chunk<T> load(uint32_t token) const {
    return x == nullptr ? Chunk<T>{} : load_chunk(x, vocab, token, aligned);
  }
};

// max(p - q, 0).
template <class T>
struct Residual {
  static constexpr int kSize = Chunk<T>::kSize;
  const Masses p;
  const DraftRow<T>& q;

  template <class Batch>
  DFLASH_INLINE auto of(const Batch& batch) const {
    using Values = typename Batch::Values;
    const auto minus = [this](float(&own)[kSize], uint32_t token, const Values& x, const Chunk<T>& drafted) {
      float of_draft[kSize];
      p(own, x);
      q(of_draft, token, drafted);
#pragma unroll
      for (int k = 0; k < kSize; ++k) own[k] = fmaxf(own[k] - of_draft[k], 0.f);
    };
    if constexpr (Batch::kIsLoaded) {
      LoadedChunks<Batch::kCount> drafted;
      if (q.x != nullptr && q.aligned) {  // the batch lies within the row, and so in the draft's
#pragma unroll
        for (int c = 0; c < Batch::kCount; ++c) {
          drafted.chunks[c] = *reinterpret_cast<const Chunk<T>*>(q.x + batch.first + c * 32 * kSize);
        }
      } else {
#pragma unroll
        for (int c = 0; c < Batch::kCount; ++c) drafted.chunks[c] = q.load(batch.first + c * 32 * kSize);
      }
      return [=](float(&own)[kSize], int c, uint32_t token, const Values& x) { minus(own, token, x, drafted.chunks[c]); };
    } else {
      return [this, minus](float(&own)[kSize], int, uint32_t token, const Values& x) { minus(own, token, x, q.load(token)); };
    }
  }

 private:
  template <int kCount>
  struct LoadedChunks {
    Chunk<T> chunks[kCount];
  };
};

template <class Source, class Team>
class Verifier {
  using T = typename Source::Element;

 public:

  DFLASH_INLINE Verifier(const VerifyParams& params, Sums* residuals, int64_t row, int64_t k)
      : p_(params), residuals_(residuals), row_(row), k_(k),
        token_(k < params.drafted ? params.tokens[row * params.drafted + k] : -1) {}

  // Both return kAccepted, or the token to commit in the draft's place, to the team's first warp. The whole team calls
  // them. `is_bonus`: there is no draft at this position.
  DFLASH_INLINE int32_t verify_greedy(Row<Source, Team>& target, bool is_bonus) const {
    target.read(false);
    if (!decides()) return kAccepted;
    const int argmax = target.argmax();
    return !is_bonus && token_ == argmax ? kAccepted : argmax;
  }

  DFLASH_INLINE int32_t verify_sampled(Row<Source, Team>& target, const Filters<float>& filters, bool is_bonus,
                                       PivotMemory* pivot_memory) const {
    // What needs nothing of the target's sums is loaded before the row.
    const double accepting_number = is_bonus ? 0 : uniform(k_);
    const bool is_known = !is_bonus && token_ >= 0 && token_ < p_.vocab;
    const DraftRow<T> q(p_, row_, k_, token_, target.temperature(), is_bonus);
    const float logit = is_known ? target.logit(token_) : 0.f, q_token = is_known ? q.probability(token_) : 0.f;
    target.read(true);
    if (pivot_memory != nullptr) filter(target, filters, *pivot_memory);
    if (is_bonus) return drawn_from(target);

    const Masses p = target.probabilities();
    const float p_token = !is_known ? 0.f : target.is_certain() ? float(target.argmax() == token_) : p(logit);
    // A token that q could not have drawn is rejected, for example if its logits are NaN.
    if (q_token > 0 && accepting_number * q_token < p_token) return kAccepted;
    if (target.is_certain()) return target.argmax();
    const Residual<T> residual{p, q};
    target.sum_tiles(residuals_, residual);
    if (!decides()) return kAccepted;
    const int token = target.draw(uniform(p_.drafted), residuals_, residual).id;
    // If p = q, the residual is only rounding, and so was the rejection.
    return token < 0 ? drawn_from(target) : token;
  }

 private:
  DFLASH_INLINE static bool decides() { return Team::rank() == 0 && warp_id() == 0; }

  DFLASH_INLINE int drawn_from(const Row<Source, Team>& target) const {
    if (!decides()) return kAccepted;
    const int token = target.is_certain() ? -1 : target.draw(uniform(p_.drafted), target.kept_by_tile(), target.masses()).id;
    return token < 0 ? target.argmax() : token;
  }

  DFLASH_INLINE double uniform(int64_t column) const {
    return p_.uniforms ? p_.uniforms[row_ * (p_.drafted + 1) + column]
                       : uniform_of(p_.seed, kVerifyStream, row_, column);
  }

  const VerifyParams& p_;
  Sums* const residuals_;
  const int64_t row_, k_, token_;
};

template <class Source, class Team, bool kFilters>
__global__ void __launch_bounds__(kThreads, kVerifyBlocks) verify_positions(const VerifyParams params) {
  __shared__ RowMemory memory;
  __shared__ Sums residuals[kMaxTiles];
  const int64_t n = blockIdx.x / Team::size(), row = n / (params.drafted + 1), k = n % (params.drafted + 1);
  Team::wait_for_inputs();
  const int64_t drafted = drafted_of(params, row);
  if (k > drafted) return;
  const Filters<float> filters(params.filters, row);
  const auto* const x = position_of<typename Source::Element>(params.target, params.target_strides, row, k);
  const int64_t* const drafts = params.tokens + row * params.drafted;  // those before k count for the penalties
  Row<Source, Team> target(logits_of<Source>(x, params.vocab, params.penalties, row, drafts, k), filters.temperature,
                           memory);
  const Verifier<Source, Team> verifier(params, residuals, row, k);
  PivotMemory* memory_of_pivots = nullptr;
  if constexpr (kFilters) {
    __shared__ PivotMemory pivot_memory;
    memory_of_pivots = &pivot_memory;
  }
  const int32_t verdict = filters.temperature == 0
                              ? verifier.verify_greedy(target, k == drafted)
                              : verifier.verify_sampled(target, filters, k == drafted, memory_of_pivots);
  if (Team::rank() == 0 && threadIdx.x == 0) params.verdicts[n] = verdict;
}

constexpr int kResolveWarps = 4;

// A warp per draft finds the first position that was not accepted.
template <class Team>
__global__ void __launch_bounds__(32 * kResolveWarps) resolve_drafts(const VerifyParams params) {
  const int64_t row = int64_t(blockIdx.x) * kResolveWarps + warp_id();
  if constexpr (Team::kOverlapsLaunches) wait_for_previous_kernel();
  if (row >= params.rows) return;
  const int32_t* verdicts = params.verdicts + row * (params.drafted + 1);
  const int64_t drafted = drafted_of(params, row);
  for (int64_t base = 0; base <= drafted; base += 32) {
    const int64_t k = base + lane_id();
    const int32_t verdict = k <= drafted ? verdicts[k] : kAccepted;
    const unsigned ends = __ballot_sync(~0u, verdict != kAccepted);
    if (ends == 0) continue;
    if (lane_id() == __ffs(ends) - 1) {
      params.accepted[row] = k;
      params.next_token[row] = verdict;
    }
    return;
  }
}

template <class T, class Team>
cudaError_t launch_verify(const VerifyParams& p, int team_size, cudaStream_t stream) {
  const auto shape_of = [&](int64_t positions) {
    LaunchShape shape{positions * team_size, kThreads, 0, team_size == 1 ? 0 : team_size};
    shape.overlaps_previous = Team::kOverlapsLaunches;
    return shape;
  };
  cudaError_t status = cudaSuccess;
  if (p.draft == Draft::kFiltered && p.drafted > 0) {
    status = launch_kernel(describe_drafts<T, Team>, shape_of(p.rows * p.drafted), stream, p);
  }
  if (status != cudaSuccess) return status;
  const auto kernel = p.penalties.any() ? verify_positions<PenalisedLogits<T>, Team, true>
                      : p.filters.any   ? verify_positions<PlainLogits<T>, Team, true>
                                        : verify_positions<PlainLogits<T>, Team, false>;
  status = launch_kernel(kernel, shape_of(p.rows * (p.drafted + 1)), stream, p);
  if (status != cudaSuccess) return status;
  LaunchShape shape{(p.rows + kResolveWarps - 1) / kResolveWarps, 32 * kResolveWarps};
  shape.overlaps_previous = Team::kOverlapsLaunches;
  return launch_kernel(resolve_drafts<Team>, shape, stream, p);
}

}  // namespace dflash::DFLASH_ISA
