// A consumer of the Hopper forward: a warpgroup that makes scores, softmax and output of 64 rows.
#pragma once

#include "attn/plan_check.h"
#include "attn/sm90/forward_tiling.h"
#include "common/named_barrier.h"

namespace dflash::DFLASH_ISA::sm90 {

template <class T, class Tiling>
class ForwardConsumer {
 public:
  DFLASH_INLINE ForwardConsumer(const AttentionForwardParams& p, const Schedule& schedule, const ForwardMaps& maps,
                                ForwardShared<Tiling>& shared, uint32_t memory)
      : p_(p),
        schedule_(schedule),
        maps_(maps),
        shared_(shared),
        index_(uniform(threadIdx.x / kWarpgroup - 1)),
        part_(Tiling::kSharesRows ? 0 : index_),
        row_(threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4),
        q_(memory + part_ * Tiling::kPanels * kQueryPanelBytes),
        k_(memory + Tiling::kKeysAt),
        v_(memory + Tiling::kValuesAt + (Tiling::kSharesRows ? index_ * kOutPanels * Tiling::kKeyPanelBytes : 0)),
        out_(memory + Tiling::kOutputAt + index_ * kOutPanels * kQueryPanelBytes),
        scores_(p) {}

  DFLASH_INLINE void run() {
    // Consumer 0 has the first turn.
    if (Tiling::kPingPong && index_ == Tiling::kConsumers - 1) pass_turn();
    Stage<Tiling::kItems> present;
    for (unsigned round = 0; schedule_.item(round) < schedule_.items; ++round) {
      shared_.item_full[present.index].wait(present.parity);
      consume(shared_.items[present.index]);
      present.advance();
    }
    if (threadIdx.x % kWarpgroup == 0) bulk_wait_group_read<0>();
  }

 private:
  static constexpr int kKeys = Tiling::kKeys;
  static constexpr int kOutPanels = Tiling::kValueColumns / kPanelColumns;
  using KeyStage = Stage<Tiling::kStages>;
  using Products = TileProducts<T, kKeys, Tiling::kPanels * kPanelColumns, Tiling::kValueColumns>;

  DFLASH_INLINE void consume(const ForwardItem& item) {
    const PackedKeyTiles<kKeys> tiles(item.plan);
    const int first = item.plan.first + part_ * (Tiling::kConsumerRows >> schedule_.fold_shift);
    const int batch = item.batch, head = item.first_head;
    float out[Tiling::kValueColumns / 2] = {};
    OnlineSoftmax softmax;
    // Load early: the first QK^T hides the latency.
    int4 loaded_bounds[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = first + position_of(row_ + 8 * r);
      loaded_bounds[r] = position < p_.q_len ? read_bounds(p_.mask, batch, position) : make_int4(0, 0, 0, 0);
    }
    shared_.q.full[q_stage_.index].wait(q_stage_.parity);

    int begin = 0, end = tiles.count();
    if (Tiling::kSkipsTiles) {
      const int2 keys = keys_of(batch, first);
      while (begin < end && !tiles[begin].meets(keys.x, keys.y)) ++begin;
      while (begin < end && !tiles[end - 1].meets(keys.x, keys.y)) --end;
      skip(begin);
    }
    const int kv_len = static_cast<int>(p_.kv_len);
    // The item's plan may be overwritten once the queries are released.
    const auto release_queries_and_plan = [&](const RowBounds(&bounds)[2]) {
      const PlanCheck check(item.plan);
#pragma unroll
      for (int r = 0; r < 2; ++r) softmax.sum[r] += check.addend(bounds[r]);
      __syncwarp();
      release_queries();
    };
    if (begin < end) {
      float s[kKeys / 2], correction[2];
      typename Products::Weights weights;
      // The next tile is worked out one tile ahead, beside the exponentials, because uniform arithmetic has long
      // latencies.
      PackedKeyTile<kKeys> next = tiles[begin + 1];
      shared_.k.full[k_stage_.index].wait(k_stage_.parity);
      start_scores(s);
      const RowBounds bounds[2] = {RowBounds(loaded_bounds[0], kv_len), RowBounds(loaded_bounds[1], kv_len)};
      wgmma_wait_group<0>();
      release(shared_.k, k_stage_);
      fence_accumulator(s);
      add(softmax, s, tiles[begin], bounds, correction);
      Products::round_weights(weights, s);
      for (int i = begin + 1; i < end; ++i) {
        const PackedKeyTile<kKeys> tile = next;
        next = tiles[i + 1];
        // The producer loads values right after keys. With two stages or more the values have arrived by now, and the
        // turn is shorter without a wait in it. With one stage the scores must not wait for the values.
        shared_.k.full[k_stage_.index].wait(k_stage_.parity);
        if (Tiling::kStages > 1) shared_.v.full[v_stage_.index].wait(v_stage_.parity);
        wait_for_turn();
        start_scores(s);
        if (Tiling::kStages == 1) shared_.v.full[v_stage_.index].wait(v_stage_.parity);
        start_output(out, weights);
        pass_turn();
        Products::overlap(
            s, weights, out, softmax, out_, [&] { release(shared_.k, k_stage_); },
            [&](float(&s)[kKeys / 2], float(&correction)[2]) { add(softmax, s, tile, bounds, correction); },
            [&] { release(shared_.v, v_stage_); });
      }
      release_queries_and_plan(bounds);
      shared_.v.full[v_stage_.index].wait(v_stage_.parity);
      start_output(out, weights);
      wgmma_wait_group<0>();
      release(shared_.v, v_stage_);
      fence_accumulator(out);
    } else {
      release_queries_and_plan({RowBounds(loaded_bounds[0], kv_len), RowBounds(loaded_bounds[1], kv_len)});
    }
    if (Tiling::kSkipsTiles) skip(tiles.count() - end);

    float inverse[2], lse[2];
    softmax.finish(scores_.factor, inverse, lse);
    write_out(batch, head, first, out, inverse);
    write_lse(batch, head, first, lse);
  }

  // Returns an interval [x, y) that holds all keys that the consumer's rows see. Every warp finds it for all 64 rows.
  DFLASH_INLINE int2 keys_of(int batch, int first) const {
    int lo = static_cast<int>(p_.kv_len), hi = 0;
    const auto add = [&](int begin, unsigned length) {
      if (length > 0) lo = min(lo, begin);
      if (length > 0) hi = max(hi, begin + static_cast<int>(length));
    };
#pragma unroll
    for (int row = 0; row < Tiling::kConsumerRows; row += 32) {
      const int position = first + position_of(row + threadIdx.x % 32);
      if (position >= p_.q_len) continue;
      const RowBounds bounds(p_.mask, batch, position, static_cast<int>(p_.kv_len));
      add(bounds.ctx_lo, bounds.ctx_len);
      add(bounds.blk_lo, bounds.blk_len);
    }
    return {__reduce_min_sync(~0u, lo), __reduce_max_sync(~0u, hi)};
  }

  // Releases the next tiles without using them.
  DFLASH_INLINE void skip(int tiles) {
    for (; tiles > 0; --tiles) {
      shared_.k.full[k_stage_.index].wait(k_stage_.parity);
      release(shared_.k, k_stage_);
      shared_.v.full[v_stage_.index].wait(v_stage_.parity);
      release(shared_.v, v_stage_);
    }
  }

  // The position of a row, counted from the consumer's first.
  DFLASH_INLINE int position_of(int row) const { return row >> schedule_.fold_shift; }

  DFLASH_INLINE void start_scores(typename Products::Scored& s) const {
    Products::start_scores(s, q_ + q_stage_.index * Tiling::kQueryBytes, k_ + k_stage_.index * Tiling::kKeyBytes);
  }
  DFLASH_INLINE void start_output(typename Products::Output& out, const typename Products::Weights& weights) const {
    Products::start_output(out, weights, v_ + v_stage_.index * Tiling::kKeyBytes);
  }

  // Only tiles that the plan does not call full pay for masking.
  DFLASH_INLINE void add(OnlineSoftmax& softmax, float (&s)[kKeys / 2], const PackedKeyTile<kKeys>& tile,
                         const RowBounds (&bounds)[2], float (&correction)[2]) const {
    scores_(s);
    if (!tile.is_full) hide(s, bounds, tile);
    softmax.add(s, scores_.factor, correction);
  }

  DFLASH_INLINE void wait_for_turn() const {
    if (Tiling::kPingPong) named_barrier_sync(kTurnBarrier + index_, 2 * kWarpgroup);
  }
  DFLASH_INLINE void pass_turn() const {
    const int next = index_ == Tiling::kConsumers - 1 ? 0 : index_ + 1;
    if (Tiling::kPingPong) named_barrier_arrive(kTurnBarrier + next, 2 * kWarpgroup);
  }

  // The warp is done with the stage.
  DFLASH_INLINE void release(Ring<Tiling::kStages>& ring, KeyStage& stage) const {
    if (threadIdx.x % 32 == 0) ring.empty[stage.index].arrive();
    stage.advance();
  }
  DFLASH_INLINE void release_queries() {
    if (threadIdx.x % 32 == 0) shared_.q.empty[q_stage_.index].arrive();
    q_stage_.advance();
  }

  DFLASH_INLINE void write_lse(int batch, int head, int first, const float (&lse)[2]) const {
    if (p_.lse == nullptr || threadIdx.x % 4 != 0 || (Tiling::kSharesRows && index_ > 0)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + 8 * r, position = first + position_of(row);
      if (position < p_.q_len) {
        const int64_t head_row = batch * p_.heads + head + row - (position_of(row) << schedule_.fold_shift);
        static_cast<float*>(p_.lse)[head_row * p_.q_len + position] = lse[r];
      }
    }
  }

  DFLASH_INLINE void write_out(int batch, int head, int first, const float (&out)[Tiling::kValueColumns / 2],
                               const float (&inverse)[2]) const {
    const bool leads = threadIdx.x % kWarpgroup == 0;
    if (Tiling::kOwnOutput) {
      // The previous item's output must have left.
      if (leads) bulk_wait_group_read<0>();
      named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
    } else {
      // All consumers must have read the last values, whose room the output takes.
      named_barrier_sync(kConsumersBarrier, Tiling::kConsumers * kWarpgroup);
    }
    Products::write_rows(out_, out, inverse);
    named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
    if (!leads) return;
    const int first_panel = Tiling::kSharesRows ? index_ * kOutPanels : 0;
    for (int panel = 0; panel < kOutPanels; ++panel) {
      tma_store(maps_.out, out_ + panel * kQueryPanelBytes, (first_panel + panel) * kPanelColumns, head, first, batch);
    }
    bulk_commit_group();
    if (!Tiling::kOwnOutput) {
      bulk_wait_group_read<0>();
      shared_.out_empty.arrive();
    }
  }

  const AttentionForwardParams& p_;
  const Schedule& schedule_;
  const ForwardMaps& maps_;
  ForwardShared<Tiling>& shared_;
  const int index_, part_;  // of the consumer, and of its 64 rows in the tile
  const int row_;           // the thread's first row among the consumer's 64; its other row is 8 below
  const uint32_t q_, k_, v_, out_;
  const Scores scores_;
  Stage<Tiling::kQueryStages> q_stage_;
  KeyStage k_stage_, v_stage_;
};

}  // namespace dflash::DFLASH_ISA::sm90
