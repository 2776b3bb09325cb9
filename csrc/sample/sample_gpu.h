// The kernel of `sample` on a GPU: a team of blocks per row.
#pragma once

#include <type_traits>

#include "common/launch.h"
#include "sample/pivot_gpu.h"
#include "sample/random.h"

namespace dflash::DFLASH_ISA {

// Blocks of a multiprocessor, which bound the registers.
template <class Source, class Team, bool kFilters>
constexpr int kSampleBlocks = kFilters && (!std::is_same_v<Team, BlockTeam> || !Source::kIsPlain) ? 1 : 2;

template <class Source, class Team>
struct SampledRow {
  const SampleParams& params;
  const int64_t row;

  DFLASH_INLINE void set(SampleReal which, float value) const {
    static_cast<float*>(params.reals)[which * params.rows + row] = value;
  }
  DFLASH_INLINE void set(SampleId which, int64_t token) const { params.ids[which * params.rows + row] = token; }

  // What is known of a row with a logit of +inf: it is a point mass.
  DFLASH_INLINE void write_certain(int token) const {
    for (int which = 0; which < kConfidence + params.confidence; ++which) {
      const bool is_zero = which == kLogprob || which == kEntropy || which == kNormaliser || which == kFilteredEntropy;
      set(SampleReal(which), which == kPivot ? kInfinity : is_zero ? 0.f : 1.f);
    }
    set(kToken, token);
  }

  DFLASH_INLINE void write(const Row<Source, Team>& logits, bool is_greedy, const typename Row<Source, Team>::Token& token,
                           float sum_at_1) const {
    const float sum = logits.sums().e, x = token.logit;
    const float d = (x - logits.max()) * logits.rate(), logprob = d * kLn2 - logf(sum);
    const float second = exp2_of((logits.second() - logits.max()) * logits.rate());
    set(kProb, exp2_of(d) / sum);
    set(kLogprob, logprob);
    set(kEntropy, logits.sums().entropy());
    set(kMargin, (1 - second) / sum);
    set(kMaxProb, (1 + (logits.max() - logits.max())) / sum);  // the difference is 0, or NaN
    set(kPivot, is_greedy ? logits.max() : logits.pivot());
    set(kNormaliser, is_greedy ? logits.max() : logits.normaliser());
    set(kFilteredEntropy, is_greedy ? 0 : logits.kept().entropy());
    if (params.confidence) set(kConfidence, exp2_of((x - logits.max()) * kLog2E) / sum_at_1);
    set(kToken, token.id);
  }
};

// kFilters: the filters and the confidence are computed, which take registers.
template <class Source, class Team, bool kFilters>
__global__ void __launch_bounds__(kThreads, (kSampleBlocks<Source, Team, kFilters>))
    sample_rows(const SampleParams params) {
  __shared__ RowMemory memory;
  const int64_t n = blockIdx.x / Team::size();
  Team::wait_for_inputs();
  const Filters<float> filters(params.filters, n);
  const bool is_greedy = filters.temperature == 0;
  const auto* const x = static_cast<const typename Source::Element*>(params.logits) + n * params.stride;
  Row<Source, Team> row(logits_of<Source>(x, params.vocab, params.penalties, n), filters.temperature, memory);
  // Without filters, whose search needs the registers, the number is there before it is needed.
  const auto uniform = [&] { return uniform_of(params.seed, kSampleStream, n, 0); };
  const double early = kFilters || is_greedy ? 0 : uniform();
  row.read(true);
  __shared__ float sum_at_1;  // the first thread writes and reads it
  if (threadIdx.x == 0) sum_at_1 = row.sums().e;
  if constexpr (kFilters) {
    __shared__ PivotMemory pivot_memory;
    __shared__ Sums at_1[kMaxTiles];
    if (params.confidence && row.temperature() != 1) {
      const Sums sum = row.sum_tiles(at_1, Masses{-kInfinity, row.max(), kLog2E, 1});
      if (threadIdx.x == 0) sum_at_1 = sum.e;
    }
    if (!is_greedy) filter(row, filters, pivot_memory);
  }

  if (Team::rank() != 0) return;
  const SampledRow<Source, Team> out{params, n};
  if (warp_id() == 0) {
    typename Row<Source, Team>::Token token{-1, 0};
    if (!is_greedy && !row.is_certain()) token = row.draw(kFilters ? uniform() : early, row.kept_by_tile(), row.masses());
    if (token.id < 0) {
      token.id = row.argmax();
      token.logit = row.logit(token.id);
    }
    if (lane_id() == 0) row.is_certain() ? out.write_certain(token.id) : out.write(row, is_greedy, token, sum_at_1);
  } else if (warp_id() == 1) {
    const int token = row.argmax();
    if (lane_id() == 0) out.set(kArgmax, token);
  }
}

template <class T, class Team>
cudaError_t launch_sample(const SampleParams& p, int team_size, cudaStream_t stream) {
  const auto kernel = p.penalties.any()                ? sample_rows<PenalisedLogits<T>, Team, true>
                      : p.filters.any || p.confidence ? sample_rows<PlainLogits<T>, Team, true>
                                                      : sample_rows<PlainLogits<T>, Team, false>;
  LaunchShape shape{p.rows * team_size, kThreads, 0, team_size == 1 ? 0 : team_size};
  shape.overlaps_previous = Team::kOverlapsLaunches;
  return launch_kernel(kernel, shape, stream, p);
}

}  // namespace dflash::DFLASH_ISA
