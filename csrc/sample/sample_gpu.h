// The kernel of `sample` on a GPU: a team of blocks per row.
#pragma once

#include "common/launch.h"
#include "sample/pivot_gpu.h"
#include "sample/random.h"
#include "sample/team_size.h"

namespace dflash::DFLASH_ISA {

template <class Source>
DFLASH_INLINE Source logits_of_row(const SampleParams& p, int64_t n) {
  if constexpr (std::is_constructible_v<Source, typename Source::Raw, float>) {
    return {typename Source::Raw(p.logits, p.dtype, n * p.stride, p.vocab), float(p.softcap)};
  } else {
    return logits_of<Source>(p.logits, p.dtype, n * p.stride, p.vocab, p.penalties, n);
  }
}

// kFilters: the filters and the confidence are computed, which take registers. Blocks of a multiprocessor bound them.
template <bool kFilters>
constexpr int kSampleBlocks = kFilters ? 1 : 2;

template <class Source, class Team>
struct SampledRow {
  using Token = typename Row<Source, Team>::Token;
  const SampleParams& params;
  const int64_t row;

  DFLASH_INLINE void set(SampleReal which, float value) const {
    static_cast<float*>(params.reals)[which * params.rows + row] = value;
  }
  DFLASH_INLINE void set(SampleId which, int64_t token) const { params.ids[which * params.rows + row] = token; }

  // A row with a logit of +inf is a point mass at it.
  DFLASH_INLINE void write_token(const Row<Source, Team>& logits, const Token& token, float sum, float sum_at_1) const {
    const bool is_certain = logits.is_certain();
    const float d = (token.logit - logits.max()) * logits.rate();
    set(kProb, is_certain ? 1 : exp2_of(d) / sum);
    set(kLogprob, is_certain ? 0 : d * kLn2 - logf(sum));
    if (params.confidence) set(kConfidence, is_certain ? 1 : exp2_of((token.logit - logits.max()) * kLog2E) / sum_at_1);
    set(kToken, token.id);
  }

  // What does not depend on the token. A whole warp calls this.
  DFLASH_INLINE void write_row(const Row<Source, Team>& logits, bool is_greedy) const {
    const Sums sums = logits.sums(), kept = logits.kept_sums();
    const float second = exp2_of((logits.second() - logits.max()) * logits.rate());
    if (lane_id() != 0) return;
    if (logits.is_certain()) {
      set(kEntropy, 0);
      set(kMargin, 1);
      set(kMaxProb, 1);
      set(kPivot, kInfinity);
      set(kNormaliser, 0);
      set(kFilteredEntropy, 0);
      return;
    }
    set(kEntropy, sums.entropy());
    set(kMargin, (1 - second) / sums.e);
    set(kMaxProb, (1 + (logits.max() - logits.max())) / sums.e);  // the difference is 0, or NaN
    set(kPivot, is_greedy ? logits.max() : logits.pivot());
    set(kNormaliser, is_greedy ? logits.max() : logits.normaliser());
    set(kFilteredEntropy, is_greedy ? 0 : kept.entropy());
  }
};

// Draws a token from a row whose sums are known, and writes what the operator returns. The whole team calls this.
template <class Source, class Team>
DFLASH_INLINE void finish_draw(const Row<Source, Team>& row, const SampledRow<Source, Team>& out, bool is_greedy,
                               double uniform, float sum, float sum_at_1) {
  const bool draws = !is_greedy && !row.is_certain();
  const auto place = draws ? row.place_of(uniform) : typename Row<Source, Team>::Place{-1, 0};
  const auto token = row.token_at(place, row.masses()), argmax = row.argmax();
  if (Team::rank() == 0 && warp_id() == kWarps - 1) out.write_row(row, is_greedy);
  if (lane_id() != 0) return;
  if (argmax.id >= 0) out.set(kArgmax, argmax.id);
  const bool is_drawn = place.tile >= 0;
  const typename Row<Source, Team>::Token chosen{is_drawn ? token.id : argmax.id,
                                                 is_drawn ? token.logit : argmax.logit};
  if (chosen.id >= 0) out.write_token(row, chosen, sum, sum_at_1);
}

template <class Source, class Team, bool kFilters>
__global__ void __launch_bounds__(kThreads, kSampleBlocks<kFilters>) sample_rows(const SampleParams params) {
  __shared__ RowMemory memory;
  const uint32_t n = blockIdx.x / Team::size();
  prefetch_first_tiles<Source, Team>(typename Source::Raw(params.logits, params.dtype, n * params.stride, params.vocab));
  Team::wait_for_inputs();
  const Filters<float> filters(params.filters, n);
  const bool is_greedy = filters.temperature == 0;
  Row<Source, Team> row(logits_of_row<Source>(params, n), filters.temperature, memory);
  __shared__ double uniform;
  row.template read<kFilters>(true, [&] { uniform = uniform_of(params.seed, kSampleStream, n, 0); }, [] {});
  const SampledRow<Source, Team> out{params, n};
  const float sum = row.kept();  // before the filters
  float sum_at_1 = sum;
  if constexpr (kFilters) {
    __shared__ PivotMemory pivot_memory;
    __shared__ float at_1[kMaxTiles];
    if (params.confidence && row.temperature() != 1) {
      row.sum_tiles(at_1, Masses{-kInfinity, row.max(), kLog2E, 1});
      sum_at_1 = row.total([&](int t) { return at_1[t]; });
    }
    if (!is_greedy) filter(row, filters, pivot_memory);
    row.sum_kept();
  }

  finish_draw(row, out, is_greedy, uniform, sum, sum_at_1);
}

template <class T, class Team>
cudaError_t launch_sample(const SampleParams& p, int team_size, cudaStream_t stream) {
  const auto launch = [&]<class Source>(auto* kernel) {
    return launch_kernel(kernel, team_shape<Source, Team>(p.rows, p.vocab, team_size), stream, p);
  };
  if (p.penalties.any()) return launch.template operator()<PenalisedLogits>(sample_rows<PenalisedLogits, Team, true>);
  return launch.template operator()<PlainLogits<T>>(p.filters.any || p.confidence
                                                        ? sample_rows<PlainLogits<T>, Team, true>
                                                        : sample_rows<PlainLogits<T>, Team, false>);
}

}  // namespace dflash::DFLASH_ISA
