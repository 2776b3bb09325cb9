// The kernels of `verify` on a GPU. A team of blocks decides on one position of a draft as if all before it were
// accepted, and finds the token that takes its place if it is not. A last, small kernel (positions_gpu.h) finds where each
// draft ends.
#pragma once

#include "common/launch.h"
#include "sample/greedy_gpu.h"
#include "sample/pivot_gpu.h"
#include "sample/positions_gpu.h"
#include "sample/random.h"
#include "sample/team_size.h"

namespace dflash::DFLASH_ISA {

constexpr int kVerifyBlocks = 1;  // of a multiprocessor; it bounds the registers

// Finds the pivots and normalisers of draft logits. The pivot of a point mass is +inf, and its "normaliser" is the
// bits of its token.
template <class T, class Team>
__global__ void __launch_bounds__(kThreads, kVerifyBlocks) describe_drafts(const VerifyParams params) {
  __shared__ RowMemory memory;
  __shared__ PivotMemory pivot_memory;
  const uint32_t n = blockIdx.x / Team::size(), drafted = params.drafted;
  const int64_t row = n / drafted, k = n % drafted;
  const PlainLogits<T> logits(params.draft_logits, params.dtype, offset_of(params.draft_strides, row, k), params.vocab);
  prefetch_first_tiles<PlainLogits<T>, Team>(logits);
  Team::wait_for_inputs();
  const Filters<float> filters(params.filters, row);
  if (filters.temperature == 0 || k >= drafted_of(params, row)) return;
  Row<PlainLogits<T>, Team> draft(logits, filters.temperature, memory);
  draft.template read<true>(true, [] {}, [] {});
  filter(draft, filters, pivot_memory);
  const int argmax = draft.argmax().id;
  float* const pivots = static_cast<float*>(params.described_drafts);
  if (argmax >= 0 && lane_id() == 0) {
    pivots[n] = draft.is_certain() ? kInfinity : draft.pivot();
    pivots[params.rows * params.drafted + n] = draft.is_certain() ? __int_as_float(argmax) : draft.normaliser();
  }
}

// The distribution q of one drafted token: a point mass, or masses of logits.
template <class Raw, class Team>
struct DraftMasses {
  using Values = typename Raw::Values;
  Raw logits;
  bool is_point;
  uint32_t point;  // the token of a point mass; no token's number if it is outside of the vocabulary
  Masses masses;
  const Values* kept;  // the row in shared memory, if teams keep rows

  DFLASH_INLINE float probability(int64_t token, float logit) const {
    return is_point ? float(token == point) : masses(logit);
  }
  DFLASH_INLINE Values load(uint32_t token) const {
    if constexpr (Team::kKeepsRow) {
      return load_kept(kept + token / Raw::kSize);
    } else {
      return logits.at(token);
    }
  }
};

// What is loaded of a draft before the target's row is read.
template <class Raw>
struct DraftRow {
  const Raw logits;
  const bool has_logits, is_filtered;
  float pivot = kInfinity, normaliser = 0;

  DFLASH_INLINE DraftRow(const VerifyParams& p, int64_t row, int64_t k, bool is_bonus)
      : logits(p.draft_logits, p.dtype, offset_of(p.draft_strides, row, k), p.vocab),
        has_logits(p.draft != Draft::kPoint && !is_bonus), is_filtered(p.draft == Draft::kFiltered) {
    if (!has_logits) return;
    const int64_t n = row * p.drafted + k;
    const float* const found = static_cast<const float*>(p.described_drafts);
    pivot = (is_filtered ? found : static_cast<const float*>(p.pivots))[n];
    normaliser = (is_filtered ? found + p.rows * p.drafted : static_cast<const float*>(p.normalisers))[n];
  }

  // is_known: the token is of the vocabulary.
  template <class Team>
  DFLASH_INLINE DraftMasses<Raw, Team> masses(float temperature, int64_t token, bool is_known,
                                              const typename Raw::Values* kept) const {
    const bool is_point = pivot == kInfinity;
    const uint32_t point = is_point && is_filtered ? __float_as_uint(normaliser) : is_known ? uint32_t(token) : ~0u;
    return {logits, is_point, point,
            Masses{smallest_logit(pivot, temperature), normaliser * temperature, kLog2E / temperature, 1}, kept};
  }
};

// max(p - q, 0), where q has logits.
template <class Raw, class Team>
struct Residual {
  static constexpr int kSize = Raw::kSize;
  const Masses p;
  const DraftMasses<Raw, Team>& q;

  template <class Batch>
  DFLASH_INLINE auto of(const Batch& batch) const {
    using Values = typename Batch::Values;
    const auto minus = [this](float(&own)[kSize], const Values& x, const typename Raw::Values& drafted) {
      p(own, x);
#pragma unroll
      for (int k = 0; k < kSize; ++k) own[k] = fmaxf(own[k] - q.masses(to_float(drafted.values[k])), 0.f);
    };
    if constexpr (Batch::kIsLoaded) {
      LoadedChunks<Batch::kCount> drafted;
      if (q.logits.is_whole(batch.first + ((Batch::kCount - 1) * 32 + 1) * kSize)) {
#pragma unroll
        for (int c = 0; c < Batch::kCount; ++c) drafted.chunks[c] = q.logits.load_whole(batch.first + c * 32 * kSize);
      } else {
#pragma unroll
        for (int c = 0; c < Batch::kCount; ++c) drafted.chunks[c] = q.load(batch.first + c * 32 * kSize);
      }
      return [=](float(&own)[kSize], int c, uint32_t, const Values& x) { minus(own, x, drafted.chunks[c]); };
    } else {
      return [this, minus](float(&own)[kSize], int, uint32_t token, const Values& x) { minus(own, x, q.load(token)); };
    }
  }

 private:
  template <int kCount>
  struct LoadedChunks {
    typename Raw::Values chunks[kCount];
  };
};

// The masses of all tokens but one, which are the residual of a point mass.
struct AllButOne {
  const Masses p;
  const uint32_t without;

  template <class Batch>
  DFLASH_INLINE auto of(const Batch&) const {
    using Values = typename Batch::Values;
    return [this](float(&own)[Values::kSize], int, uint32_t token, const Values& x) {
      p(own, x);
#pragma unroll
      for (int k = 0; k < Values::kSize; ++k) own[k] = token + k == without ? 0.f : own[k];
    };
  }
};

// What one warp finds out about a position while the others read the row: its random numbers, and the drafted token's
// logit.
struct Drawn {
  double accepting, drawing;
  float logit;
};

// Verifies position k of a draft. The whole team calls its functions, which write the verdict.
template <class Source, class Team>
class Verifier {
  using Target = Row<Source, Team>;
  using Raw = typename Source::Raw;

 public:
  DFLASH_INLINE Verifier(const VerifyParams& params, int64_t row, int64_t k, bool is_bonus)
      : p_(params), row_(row), k_(k), is_bonus_(is_bonus),
        token_(k < params.drafted ? params.tokens[row * params.drafted + k] : -1) {}

  DFLASH_INLINE void verify_greedy(Target& target) const {
    target.template read<false>(false, [] {}, [] {});
    write_argmax(target, true);
  }

  DFLASH_INLINE void verify_sampled(Target& target, const Filters<float>& filters, PivotMemory& memory, Drawn& drawn,
                                    float* residuals) const {
    const DraftRow<Raw> draft(p_, row_, k_, is_bonus_);
    const bool is_known = !is_bonus_ && token_ >= 0 && token_ < p_.vocab;
    const auto draw = [&] {
      drawn.logit = is_known ? target.logit(token_) : 0;
      drawn.accepting = is_bonus_ ? 0 : uniform(k_);
      drawn.drawing = uniform(p_.drafted);
    };
    float draft_logit = 0;
    constexpr bool kKeeps = Team::kKeepsRow;
    // The draft's row comes after the target's, whose reader would wait for both.
    const auto load_draft = [&] {
      if (!draft.has_logits) return;
      if (is_known) draft_logit = draft.logits[token_];
      if constexpr (kKeeps) target.keep_beside(draft.logits);
    };
    target.template read<true>(true, draw, load_draft);
    filter(target, filters, memory);
    bool may_accept = false;  // the argmax
    if (!is_bonus_) {
      const typename Raw::Values* kept = nullptr;
      if constexpr (kKeeps) {
        cp_async_wait_group<0>();
        kept = target.template kept_beside<Raw>(0);
      }
      const auto q = draft.template masses<Team>(target.temperature(), token_, is_known, kept);
      // A token that q could not have drawn is rejected, for example if its logits are NaN.
      const float q_token = is_known ? q.probability(token_, draft_logit) : 0;
      may_accept = q_token > 0;
      if (!target.is_certain()) {
        const Masses p = target.probabilities();
        if (may_accept && drawn.accepting * q_token < p(drawn.logit)) return write_accepted();
        may_accept = false;
        if (draws_residual(target, p, q, drawn.drawing, residuals)) return;
        // If p = q, the residual is only rounding, and so was the rejection.
      }
    }
    if (!target.is_certain()) {
      target.sum_kept();
      const auto place = target.place_of(drawn.drawing);
      if (place.tile >= 0) return write(target.token_at(place, target.masses()).id);
    }
    write_argmax(target, may_accept);
  }

 private:
  DFLASH_INLINE void write_verdict(int32_t verdict) const {
    if (lane_id() == 0) p_.verdicts[row_ * (p_.drafted + 1) + k_] = verdict;
  }
  DFLASH_INLINE void write_accepted() const {
    if (Team::rank() == 0 && warp_id() == 0) write_verdict(kAccepted);
  }
  // In the one warp that has it.
  DFLASH_INLINE void write(int token) const {
    if (token >= 0) write_verdict(token);
  }
  // The argmax, which is accepted if it was drafted and may be.
  DFLASH_INLINE void write_argmax(const Target& target, bool may_accept) const {
    const int argmax = target.argmax().id;
    if (argmax >= 0) write_verdict(may_accept && !is_bonus_ && token_ == argmax ? kAccepted : argmax);
  }
  // Returns whether there is a residual. It then draws from it.
  DFLASH_INLINE bool draws_residual(Target& target, const Masses& p, const DraftMasses<Raw, Team>& q,
                                    double number, float* sums) const {
    if (q.is_point) {
      target.sum_kept();
      const AllButOne residual{target.masses(), q.point};
      const int tile = target.sum_tile_of(q.point, sums, residual);
      const auto place = target.place_of(number, [&](int t) { return t == tile ? *sums : target.kept_of(t).e; });
      if (place.tile < 0) return false;
      write(target.token_at(place, residual).id);
    } else {
      const Residual<Raw, Team> residual{p, q};
      target.sum_tiles(sums, residual);
      const auto place = target.place_of(number, [&](int t) { return sums[t]; });
      if (place.tile < 0) return false;
      write(target.token_at(place, residual).id);
    }
    return true;
  }

  DFLASH_INLINE double uniform(int64_t column) const {
    return p_.uniforms ? p_.uniforms[row_ * (p_.drafted + 1) + column]
                       : uniform_of(p_.seed, kVerifyStream, row_, column);
  }

  const VerifyParams& p_;
  const int64_t row_, k_;
  const bool is_bonus_;  // there is no draft at this position
  const int64_t token_;
};

template <class Source, class Team>
__global__ void __launch_bounds__(kThreads, kVerifyBlocks) verify_positions(const VerifyParams params) {
  __shared__ RowMemory memory;
  __shared__ PivotMemory pivot_memory;
  __shared__ Drawn drawn;
  __shared__ float residuals[kMaxTiles];
  const uint32_t n = blockIdx.x / Team::size(), positions = params.drafted + 1;
  const int64_t row = n / positions, k = n % positions;
  const int64_t offset = offset_of(params.target_strides, row, k);
  prefetch_first_tiles<Source, Team>(typename Source::Raw(params.target, params.dtype, offset, params.vocab));
  if (Team::kKeepsRow && params.draft != Draft::kPoint && k < params.drafted) {
    const int64_t at = offset_of(params.draft_strides, row, k);
    prefetch_first_tiles<Source, Team>(typename Source::Raw(params.draft_logits, params.dtype, at, params.vocab));
  }
  Team::wait_for_inputs();
  const int64_t drafted = drafted_of(params, row);
  if (k > drafted) return;
  const Filters<float> filters(params.filters, row);
  const int64_t* const drafts = params.tokens + row * params.drafted;  // those before k count for the penalties
  Row<Source, Team> target(
      logits_of<Source>(params.target, params.dtype, offset, params.vocab, params.penalties, row, drafts, k),
      filters.temperature, memory);
  const Verifier<Source, Team> verifier(params, row, k, k == drafted);
  if (filters.temperature == 0) {
    verifier.verify_greedy(target);
  } else {
    verifier.verify_sampled(target, filters, pivot_memory, drawn, residuals);
  }
}

DFLASH_INLINE int32_t written_verdict(const VerifyParams& p, int64_t row, int64_t k, bool) {
  return p.verdicts[row * (p.drafted + 1) + k];
}

// How many rows a team that keeps rows has in shared memory: the target's, and the draft's.
inline int kept_rows_of(const VerifyParams& p) { return p.draft == Draft::kPoint ? 1 : 2; }

template <class T, class Team>
cudaError_t launch_verify(const VerifyParams& p, int team_size, cudaStream_t stream) {
  if (p.is_greedy()) return launch_greedy<T, Team>(p, stream);
  cudaError_t status = cudaSuccess;
  if (p.draft == Draft::kFiltered && p.drafted > 0) {
    const LaunchShape shape = team_shape<PlainLogits<T>, Team>(p.rows * p.drafted, p.vocab, team_size);
    status = launch_kernel(describe_drafts<T, Team>, shape, stream, p);
  }
  if (status != cudaSuccess) return status;
  const auto launch = [&]<class Source>() {
    LaunchShape shape = team_shape<Source, Team>(p.rows * (p.drafted + 1), p.vocab, team_size);
    if (Team::kKeepsRow) shape.shared_bytes *= kept_rows_of(p);
    return launch_kernel(verify_positions<Source, Team>, shape, stream, p);
  };
  status = p.penalties.any() ? launch.template operator()<PenalisedLogits>()
                             : launch.template operator()<PlainLogits<T>>();
  return status == cudaSuccess ? launch_resolve<Team, written_verdict>(p, stream) : status;
}

}  // namespace dflash::DFLASH_ISA
