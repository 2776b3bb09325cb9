// A consumer of Hopper's decode kernel: a warpgroup that sums 64 rows of an item over the block's slice of the keys, or
// over every other tile of it where two take turns.
#pragma once

#include "attn/not_finite.h"
#include "attn/plan_check.h"
#include "attn/sm90/decode_tiling.h"
#include "common/named_barrier.h"

namespace dflash::DFLASH_ISA::sm90 {

template <class T, class Tiling>
struct DecodeConsumer {
  static constexpr int kKeys = Tiling::kKeys, kDim = Tiling::kDim;
  using Products = TileProducts<T, kKeys, kDim, kDim>;

  // A row's position, -1 if the row does not exist, and its query head.
  struct Place {
    int position, head;
  };

  struct Tile {
    int key;       // the first
    bool is_full;  // all rows see all keys
  };

  const DecodeBlock<Tiling>& block;
  const DecodeSlice<kKeys>& slice = block.shared.slice;
  // The thread's rows are `row` and the one 8 below.
  const int warpgroup = uniform(threadIdx.x / 128), row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const int consumer = warpgroup / Tiling::kTurns, turn = warpgroup % Tiling::kTurns;
  const Scores scores{block.p};
  RowBounds bounds[2];
  float out[kDim / 2] = {};
  OnlineSoftmax softmax;

  // The place of one of the consumer's rows.
  DFLASH_INLINE Place place(int row) const {
    const DecodeLayout& layout = block.layout;
    const int within = row / layout.fold, at = slice.plan.first + consumer * layout.positions + within;
    return {within < layout.positions && at < block.p.q_len ? at : -1,
            slice.kv_head * layout.fold + row - within * layout.fold};
  }

  DFLASH_INLINE Tile tile_at(int i) const {
    const int key = slice.key(i);
    const auto within = [&](int run) {
      return (key >= slice.plan.full_lo[run]) & (key + kKeys <= slice.plan.full_hi[run]);
    };
    return {key, static_cast<bool>(within(0) | within(1))};
  }

  DFLASH_INLINE void read_rows() {
    const PlanCheck check(slice.plan);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = place(row + 8 * r).position;
      if (position < 0) continue;
      bounds[r] = RowBounds(block.p.mask, slice.batch, position, static_cast<int>(block.p.kv_len));
      softmax.sum[r] = check.addend(bounds[r]);
    }
  }

  // The block has at least `turn` + 1 tiles.
  DFLASH_INLINE void consume() {
    auto& shared = block.shared;
    const uint32_t queries = block.queries + consumer * Tiling::kPanels * kQueryPanelBytes;
    float s[kKeys / 2];
    typename Products::Weights weights;
    Stage<Tiling::kStages> k_stage, v_stage;
    // The next tile is worked out one tile ahead, beside the exponentials, because uniform arithmetic has long
    // latencies.
    int visit = slice.from(slice.begin + turn + Tiling::kTurns);
    Tile tile = tile_at(slice.begin + turn), next = tile_at(visit);
    for (int other = 0; other < turn; ++other) k_stage.advance(), v_stage.advance();
    const auto release = [](auto& ring, auto& stage) {
      if (threadIdx.x % 32 == 0) ring.empty[stage.index].arrive();
#pragma unroll
      for (int other = 0; other < Tiling::kTurns; ++other) stage.advance();
    };
    const auto start_scores = [&] {
      shared.k.full[k_stage.index].wait(k_stage.parity);
      Products::start_scores(s, queries, block.keys_at(k_stage.index));
    };
    const auto wait_for_values = [&] { shared.v.full[v_stage.index].wait(v_stage.parity); };
    const auto start_output = [&] {
      const uint32_t values = block.values_at(v_stage.index);
      if (!tile.is_full) {
        const auto pair_at = [&](int key, int fragment) {
          const uint32_t of_row = values + fragment / 8 * Tiling::kKeyPanelBytes + key * kPanelRowBytes;
          return of_row + (fragment % 8 ^ key % 8) * 16 + threadIdx.x % 4 * 4;
        };
        const int barrier = Tiling::kTurns == 1 ? kDecodeConsumersBarrier : kDecodeConsumerBarrier + turn;
        if (set_aside<T, kKeys, Tiling::kTileThreads>(values, Tiling::kKeyBytes, tile.key, bounds, out, barrier,
                                                      pair_at, threadIdx.x % Tiling::kTileThreads)) {
          fence_proxy_async();
          named_barrier_sync(barrier, Tiling::kTileThreads);
        }
      }
      Products::start_output(out, weights, values);
    };
    const auto add = [&](float(&s)[kKeys / 2], float(&correction)[2]) {
      scores(s);
      if (!tile.is_full) hide(s, bounds, tile.key);
      softmax.add(s, scores.factor, correction);
    };

    shared.q_full.wait(0);
    start_scores();
    wgmma_wait_group<0>();
    release(shared.k, k_stage);
    fence_accumulator(s);
    float no_correction[2];
    add(s, no_correction);
    Products::round_weights(weights, s);
    while (visit < slice.end) {
      // Where products are the limit, keys and values have both arrived by now, and nothing comes between the two
      // products.
      if (Tiling::kConsumers > 1) wait_for_values();
      start_scores();
      if (Tiling::kConsumers == 1) wait_for_values();
      start_output();
      tile = next;
      visit = slice.from(visit + Tiling::kTurns);
      next = tile_at(visit);
      Products::overlap(
          s, weights, out, softmax, queries, [&] { release(shared.k, k_stage); }, add,
          [&] { release(shared.v, v_stage); });
    }
    wait_for_values();
    start_output();
    if (Tiling::kTurns == 1 && block.ranks > 1) announce();
    wgmma_wait_group<0>();
    fence_accumulator(out);
  }

  DFLASH_INLINE void announce() const { block.sums().announce(softmax.largest, softmax.sum); }

  // Adds the sums of the other warpgroup with the same rows, over shared memory, where the keys were. Returns whether
  // this warpgroup has them now.
  DFLASH_INLINE bool join() {
    const uint32_t memory = block.keys_at(0) + threadIdx.x % 128 * 16;
    static_assert((kDim / 8 + 1) * 128 * 16 <= Tiling::kStages * Tiling::kKeyBytes);
    const auto place = [&](int i) { return memory + i * 128 * 16; };
    named_barrier_sync(kDecodeConsumersBarrier, Tiling::kConsumerThreads);  // nobody reads keys any more
    if (turn > 0) {
      const auto write = [&](int i, float a, float b, float c, float d) {
        write_shared(place(i), {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)});
      };
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) write(i, out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
      write(kDim / 8, softmax.largest[0], softmax.largest[1], softmax.sum[0], softmax.sum[1]);
      named_barrier_arrive(kTurnsBarrier, Tiling::kConsumerThreads);
      return false;
    }
    named_barrier_sync(kTurnsBarrier, Tiling::kConsumerThreads);
    const auto read = [&](int i) {
      const uint4 x = read_shared(place(i));
      return float4{__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
    };
    const float4 other = read(kDim / 8);
    const float2 weights[2] = {join_row(0, other.x, other.z), join_row(1, other.y, other.w)};
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const float4 x = read(i);
      const float others[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float2 weight = weights[c / 2];
        out[4 * i + c] = fmaf(weight.x, out[4 * i + c], weight.y * others[c]);
      }
    }
    fence_proxy_async();  // other blocks may write here next
    return true;
  }

  // Adds the state of the softmax of row r over other keys. Returns the weights of the row's two outputs, its own first.
  DFLASH_INLINE float2 join_row(int r, float largest, float sum) {
    const float m = fmaxf(softmax.largest[r], largest), base = m == -kInfinity ? 0.0f : __fmul_rn(m, scores.factor);
    const auto weight_of = [&](float largest) { return exp2_of(__fmul_rn(largest, scores.factor) - base); };
    const float2 weights = {weight_of(softmax.largest[r]), weight_of(largest)};
    softmax.largest[r] = m;
    softmax.sum[r] = fmaf(weights.x, softmax.sum[r], weights.y * sum);
    return weights;
  }

  // The end of an item that one block has alone. The results leave from where the queries were.
  DFLASH_INLINE void finish() const {
    const float inverse[2] = {inverse_of(total_of(softmax.sum[0])), inverse_of(total_of(softmax.sum[1]))};
    const uint32_t rows = block.queries + consumer * Tiling::kPanels * kQueryPanelBytes;
    named_barrier_sync(kDecodeConsumerBarrier + consumer, 128);
    Products::write_rows(rows, out, inverse);
    named_barrier_sync(kDecodeConsumerBarrier + consumer, 128);
    if (threadIdx.x % 128 != 0) return;
    for (int panel = 0; panel < Tiling::kPanels; ++panel) {
      tma_store(block.maps.out, rows + panel * kQueryPanelBytes, panel * kPanelColumns,
                slice.kv_head * block.layout.fold, slice.plan.first + consumer * block.layout.positions, slice.batch);
    }
    bulk_commit_group();
    bulk_wait_group_read<0>();
  }

  // The end of an item that the blocks of the cluster share.
  DFLASH_INLINE void finish_together() const {
    const auto sums = block.sums();
    named_barrier_sync(kDecodeConsumersBarrier, Tiling::kTileThreads);
    sums.lay_out(out);
    const DecodeParams& p = block.p;
    const Place at = place(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16);
    T* const to = static_cast<T*>(p.out) + slice.batch * p.out_strides.batch + at.head * p.out_strides.head +
                  at.position * p.out_strides.row;
    const int columns = at.position < 0 ? 0 : static_cast<int>(p.head_dim);
    sums.add_up(scores.factor, [&](int fragment, const float (&x)[8]) {
      if (fragment * 8 >= columns) return;
      *reinterpret_cast<uint4*>(to + fragment * 8) = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                                                      pack<T>(x[6], x[7])};
    });
  }
};

}  // namespace dflash::DFLASH_ISA::sm90
