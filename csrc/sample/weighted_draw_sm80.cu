// One draw per row, and the weights of the row's expected embedding, from one read of the logits: what `sample` and
// `soft_embedding` would read one after the other. One block has a row.
#include "common/dispatch.h"
#include "sample/kernels.h"
#include "sample/sample_gpu.h"
#include "sample/weights_gpu.h"

namespace dflash {
namespace device {
namespace {

// Writes weights 2^(z - origin), z = logit / temperature in units of log2, and adds up what it wrote.
struct WeightWriter {
  const WeightedDrawParams& params;
  float rate, origin;
  float sum = 0;

  template <int kCount>
  DFLASH_INLINE void operator()(uint32_t token, const float (&masses)[kCount], float top) {
    const float scale = exp2_of(top * rate - origin);
    float own[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) own[k] = masses[k] * scale;
    if (token < params.draw.vocab) store(token, own);
  }
  template <int kCount>
  DFLASH_INLINE void store(uint32_t token, const float (&own)[kCount]) {
    sum += store_rounded(static_cast<__nv_bfloat16*>(params.weights) + blockIdx.x * params.draw.vocab + token, own);
  }
};

// The vocabulary is a multiple of a chunk, and rows are aligned.
template <class Source>
__global__ void __launch_bounds__(kThreads, 2) weighted_draw_sm80(const WeightedDrawParams params) {
  using Logits = Row<Source, BlockTeam>;
  constexpr int kSize = Source::kSize;
  __shared__ RowMemory memory;
  __shared__ float of_warps[kWarps];
  __shared__ double uniform;
  const SampleParams& p = params.draw;
  const uint32_t n = blockIdx.x;
  const Filters<float> filters(p.filters, n);
  Logits row(logits_of_row<Source>(p, n), filters.temperature, memory);

  // The first logits choose the origin, which may be kHeadroom below the largest.
  const float first = largest_of(logits_of_row<Source>(p, n).at(threadIdx.x * kSize));
  const float of_warp = warp_max(first == first ? first : -kInfinity);
  if (lane_id() == 0) of_warps[warp_id()] = of_warp;
  __syncthreads();
  const float largest = warp_max(of_warps[lane_id() % kWarps]);
  WeightWriter writer{params, row.rate(), largest * row.rate()};
  row.template read<false, kLoads / 2>(true, [&] { uniform = uniform_of(p.seed, kSampleStream, n, 0); }, [] {}, writer);
  if (!(row.max() * row.rate() - writer.origin <= kHeadroom<__nv_bfloat16>)) {
    writer.origin = row.max() * row.rate();
    writer.sum = 0;
    const Source logits = logits_of_row<Source>(p, n);
#pragma unroll 1
    for (uint32_t token = threadIdx.x * kSize; token < p.vocab; token += kThreads * kSize) {
      const auto chunk = logits.at(token);
      float masses[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const float x = to_float(chunk.values[k]);
        masses[k] = x == row.max() && !row.is_empty() ? 1 : exp2_of(fmaxf((x - row.max()) * row.rate(), -1e4f));
      }
      writer.store(token, masses);
    }
  }
  const float of_lanes = warp_sum(writer.sum);
  __syncthreads();
  if (lane_id() == 0) of_warps[warp_id()] = of_lanes;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w];
    params.sums[n] = sum;
  }
  const float sum = row.kept();
  finish_draw(row, SampledRow<Source, BlockTeam>{p, n}, filters.temperature == 0, uniform, sum, sum);
}

}  // namespace
}  // namespace device

const char* weighted_draw_sm80(const WeightedDrawParams& p, void* stream) {
  return launch_by_dtype<__nv_bfloat16>(p.draw.dtype, stream, [&]<class T>(cudaStream_t stream) {
    const auto launch = [&]<class Source>(Source*) {
      const auto shape = device::team_shape<Source, device::BlockTeam>(p.draw.rows, p.draw.vocab, 1);
      return launch_kernel(device::weighted_draw_sm80<Source>, shape, stream, p);
    };
    return p.draw.softcap > 0 ? launch(static_cast<device::CappedLogits<T>*>(nullptr))
                              : launch(static_cast<device::PlainLogits<T>*>(nullptr));
  });
}

}  // namespace dflash
