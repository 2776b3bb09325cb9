// A consumer of the Hopper backward: a warpgroup that owns 64 of the keys in shared memory.
#pragma once

#include "attn/masking.h"
#include "attn/scores.h"
#include "attn/sm90/backward_tiling.h"
#include "common/named_barrier.h"

namespace dflash::DFLASH_ISA::sm90 {

// kIsCapped: the scores have a softcap.
template <class T, class Tiling, bool kIsCapped>
class BackwardConsumer {
  static constexpr int kRows = Tiling::kRows, kKeys = Tiling::kKeys, kDim = Tiling::kDim;
  static constexpr int kConsumers = Tiling::kConsumers, kConsumerKeys = Tiling::kConsumerKeys;
  static constexpr int kColumns = kDim / kConsumers;  // of dQ, the consumer's own
  static_assert(kRows == 64);
  using Scored = float[kRows / 2];
  using Weights = uint32_t[kRows / 16][4];
  using Sums = float[kDim / 2];
  using GradQ = float[kColumns / 2];
  using Writer = TileProducts<T, 64, kDim, kDim>;
  using RowStage = Stage<Tiling::kStages>;

 public:
  DFLASH_INLINE BackwardConsumer(const BackwardParams& p, const BackwardLaunch& launch,
                                 BackwardShared<Tiling>& shared, uint32_t memory)
      : p_(p),
        launch_(launch),
        shared_(shared),
        index_(uniform(threadIdx.x / kWarpgroup - 1)),
        thread_(threadIdx.x % kWarpgroup),
        k_(memory) {}

  DFLASH_INLINE void run() {
    for (;;) {
      shared_.item_slots.full[slot()].wait(turns_ / (kItemTurn * kItemSlots) & 1);
      if (item().key_tile < 0) break;
      shared_.kv_full.wait(turns_ / kItemTurn & 1);
      work_on_item();
      turns_ += kItemTurn;
    }
    if (thread_ == 0) bulk_wait_group_read<0>();
  }

 private:
  DFLASH_INLINE void work_on_item() {
    Sums grad_k = {}, grad_v = {};
    int left = item().end - item().begin;
    if (left > 0) {
      Scored s;
      wait_for_rows();
      start(s, k_, queries());
      vacate_output();  // of the item before
      wgmma_wait_group<0>();
      fence_accumulator(s);
      do {
        work_on_unit(s, grad_k, grad_v, --left > 0);
      } while (left > 0);
    }
    write(grad_k, grad_v);
  }

  // ---- one tile of rows

  // On entry s holds the tile's scores, and on return those of the next tile. After the last tile they are scores of
  // whatever the next stage holds, and nobody uses them: a product that is skipped at times would make ptxas serialize
  // all products.
  DFLASH_INLINE void work_on_unit(Scored& s, Sums& grad_k, Sums& grad_v, bool has_next) {
    Scored grad_p;
    start(grad_p, values(), gradients());
    Weights weights;
    take_exponentials(s);
    round_to_fragments<T>(weights, s);
    start_grad_v(grad_v, weights);
    wgmma_wait_group<1>();
    fence_accumulator(grad_p);
    differentiate(grad_p, s);
    hand_over(grad_p);
    GradQ grad_q;
    start_grad_q(grad_q);
    start_grad_k(grad_k);
    wgmma_wait_group<1>();
    fence_accumulator(grad_q);
    add_grad_q(grad_q);
    const RowStage used = stage_;
    stage_.advance();
    turns_ ^= 1;
    if (has_next) wait_for_rows();
    start(s, k_, queries());
    wgmma_wait_group<1>();
    if (threadIdx.x % 32 == 0) shared_.rows.empty[used.index].arrive();
    wgmma_wait_group<0>();
    fence_accumulator(s);
    fence_accumulator(grad_k);
    fence_accumulator(grad_v);
  }

  DFLASH_INLINE int slot() const { return turns_ / kItemTurn % kItemSlots; }
  DFLASH_INLINE const BackwardItem& item() const { return shared_.items[slot()]; }

  // Where things lie: all at constant distances from the keys, because registers are scarce.
  DFLASH_INLINE uint32_t values() const { return k_ + Tiling::kValuesAt; }
  DFLASH_INLINE uint32_t queries() const { return k_ + Tiling::kRowsAt + stage_.index * 2 * Tiling::kRowBytes; }
  DFLASH_INLINE uint32_t gradients() const { return queries() + Tiling::kRowBytes; }
  DFLASH_INLINE uint32_t grad_s() const { return k_ + Tiling::kScoresAt + (turns_ & 1) * Tiling::kScoreBytes; }

  DFLASH_INLINE void wait_for_rows() {
    shared_.rows.full[stage_.index].wait(stage_.parity);
    if (shared_.units[stage_.index].has_empty) clear_empty_rows();
  }

  // Sets rows that see nothing to zero, because a NaN in them would reach keys through a product with zero.
  DFLASH_INLINE void clear_empty_rows() {
    const float* const lse = shared_.stats[stage_.index][0];
    for (int i = thread_; i < kRows * kDim * 2 / 16; i += kWarpgroup) {
      if (lse[i / 8 % kRows] == kInfinity) {
        write_shared((index_ == 0 ? queries() : gradients()) + i * 16, make_uint4(0, 0, 0, 0));
      }
    }
    fence_proxy_async();
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
  }

  // Starts s = (the consumer's keys or values) rows^T.
  DFLASH_INLINE void start(Scored& s, uint32_t keys, uint32_t rows) const {
    start_row_products<T, kRows, kDim, kKeys * kPanelRowBytes, kRows * kPanelRowBytes>(
        s, keys + index_ * kQueryPanelBytes, rows);
    wgmma_commit_group();
  }

  // Starts grad_v += probabilities^T grad_out.
  DFLASH_INLINE void start_grad_v(Sums& sums, const Weights& weights) const {
    start_register_products<T, kDim, kRows, kRows * kPanelRowBytes>(sums, weights, opaque(gradients()));
    wgmma_commit_group();
  }

  // Starts grad_k += grad_s q. There are too few registers to take grad_s from them, as start_grad_v does.
  DFLASH_INLINE void start_grad_k(Sums& sums) const {
    fence_accumulator(sums);
    wgmma_fence();
    const uint64_t a = k_major_descriptor(opaque(grad_s() + index_ * kConsumerKeys * kPanelRowBytes));
    const uint64_t b = mn_major_descriptor(opaque(queries()), kRows * kPanelRowBytes);
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
      const int row = step * 16 * kPanelRowBytes / 16;
      Wgmma<T, kDim>::template ss<kMajorK, kMajorMN>(sums, a + step * 32 / 16, b + row, true);
    }
    wgmma_commit_group();
  }

  // Starts grad_q = grad_s^T k, for the consumer's columns.
  DFLASH_INLINE void start_grad_q(GradQ& grad_q) const {
    fence_accumulator(grad_q);
    wgmma_fence();
    const int column = index_ * kColumns;
    const uint64_t a = mn_major_descriptor(opaque(grad_s()), kKeys * kPanelRowBytes);
    const uint64_t b = mn_major_descriptor(
        opaque(k_ + column / kPanelColumns * kKeys * kPanelRowBytes + column % kPanelColumns * 2),
        kKeys * kPanelRowBytes);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const int at = step * 16 * kPanelRowBytes / 16;
      Wgmma<T, kColumns>::template ss<kMajorMN, kMajorMN>(grad_q, a + at, b + at, step > 0);
    }
    wgmma_commit_group();
  }

  // The thread's columns of the scores are rows 8j + 2t and 8j + 2t + 1.
  DFLASH_INLINE void take_exponentials(Scored& s) const {
    const float* const lse = shared_.stats[stage_.index][0] + thread_ % 4 * 2;
    const float factor = kIsCapped ? 1.0f : launch_.factor;
    if constexpr (kIsCapped) shared_.scores(s);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * j);
      s[4 * j] = exp2_of(fmaf(s[4 * j], factor, -pair.x));
      s[4 * j + 1] = exp2_of(fmaf(s[4 * j + 1], factor, -pair.y));
      s[4 * j + 2] = exp2_of(fmaf(s[4 * j + 2], factor, -pair.x));
      s[4 * j + 3] = exp2_of(fmaf(s[4 * j + 3], factor, -pair.y));
    }
    if (shared_.units[stage_.index].is_full) return;
    const int key = item().key_tile * kKeys + index_ * kConsumerKeys + thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowKeys row = shared_.keys[stage_.index][(8 * j + thread_ % 4 * 2 + e) >> launch_.fold_bits];
        if (!row_sees(row, key)) s[4 * j + e] = 0;
        if (!row_sees(row, key + 8)) s[4 * j + 2 + e] = 0;
      }
    }
  }

  // grad_p becomes the gradient of the scores, given the probabilities.
  DFLASH_INLINE void differentiate(Scored& grad_p, const Scored& probabilities) const {
    const float* const delta = shared_.stats[stage_.index][1] + thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * j);
      grad_p[4 * j] = probabilities[4 * j] * (grad_p[4 * j] - pair.x);
      grad_p[4 * j + 1] = probabilities[4 * j + 1] * (grad_p[4 * j + 1] - pair.y);
      grad_p[4 * j + 2] = probabilities[4 * j + 2] * (grad_p[4 * j + 2] - pair.x);
      grad_p[4 * j + 3] = probabilities[4 * j + 3] * (grad_p[4 * j + 3] - pair.y);
      if constexpr (kIsCapped) {
        const float* const lse = shared_.stats[stage_.index][0] + thread_ % 4 * 2 + 8 * j;
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_p[4 * j + i] *= slope_of_softcap(probabilities[4 * j + i], lse[i % 2]);
      }
    }
  }

  // The derivative of cap * tanh(x / cap), which is 1 - tanh^2. There are no registers to keep the capped scores in, so
  // they come from the probabilities again. A probability of zero gives a finite slope, here zero.
  DFLASH_INLINE float slope_of_softcap(float probability, float lse) const {
    const float tanh = fmaxf(__fdividef(__log2f(probability) + lse, shared_.scores.outer), -1.0f);
    return 1 - tanh * tanh;
  }

  // Writes the gradients of the scores to shared memory, [keys, rows], where both consumers read them. Two buffers
  // take turns: when both consumers have come here again, both have used the other buffer.
  DFLASH_INLINE void hand_over(const Scored& s) const {
    const int key = index_ * kConsumerKeys + thread_ / 32 * 16 + thread_ % 16, chunk = thread_ % 32 / 16;
    const uint32_t to = grad_s() + key * kPanelRowBytes;
#pragma unroll
    for (int pair = 0; pair < kRows / 16; ++pair) {
      const float* const x = s + pair * 8;
      stmatrix_x4(to + ((pair * 2 + chunk) ^ (key % 8)) * 16, pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                  pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
    }
    fence_proxy_async();
    vacate_output();
  }

  // Waits until both consumers are here, and the copy engine has read what they gave to it.
  DFLASH_INLINE void vacate_output() const {
    if (thread_ == 0) bulk_wait_group_read<0>();
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
  }

  // Adds the consumer's columns of dQ to the sums in global memory.
  DFLASH_INLINE void add_grad_q(const GradQ& grad_q) const {
    constexpr int kFloats = kRows * kColumns;
    add(grad_q, k_ + Tiling::kGradQAt + index_ * (kFloats * 4),
        p_.grad_q_sums + (shared_.units[stage_.index].index * kConsumers + index_) * kFloats);
  }

  // Adds an accumulator to sums in global memory, by way of shared memory. The copy engine adds it: after additions by
  // the threads, the next fence would wait until memory has them.
  template <int kCount>
  DFLASH_INLINE void add(const float (&x)[kCount], uint32_t from, float* to) const {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      write_shared(from + (j * kWarpgroup + thread_) * 16,
                   make_uint4(__float_as_uint(x[4 * j]), __float_as_uint(x[4 * j + 1]), __float_as_uint(x[4 * j + 2]),
                              __float_as_uint(x[4 * j + 3])));
    }
    fence_proxy_async();
    named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
    if (thread_ == 0) {
      bulk_add(to, from, kCount * kWarpgroup * 4);
      bulk_commit_group();
    }
  }

  // ---- the end of an item

  // The next item's keys load meanwhile.
  DFLASH_INLINE void write(const Sums& grad_k, const Sums& grad_v) {
    if (threadIdx.x % 32 == 0) shared_.kv_empty.arrive();
    vacate_output();
    const uint32_t from = k_ + Tiling::kOutputAt + index_ * Tiling::kOutputBytes;
    if (item().is_whole) {
      const float scale = static_cast<float>(p_.scale), scales[2] = {scale, scale}, ones[2] = {1, 1};
      constexpr int kValuesFrom = Tiling::kPanels * kQueryPanelBytes;
      Writer::write_rows(from, grad_k, scales);
      Writer::write_rows(from + kValuesFrom, grad_v, ones);
      named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
      if (thread_ == 0) {
        const int key = item().key_tile * kKeys + index_ * kConsumerKeys;
        for (int panel = 0; panel < Tiling::kPanels; ++panel) {
          const uint32_t at = from + panel * kQueryPanelBytes;
          tma_store(launch_.grad_k, at, panel * kPanelColumns, key, item().kv_head, item().batch);
          tma_store(launch_.grad_v, at + kValuesFrom, panel * kPanelColumns, key, item().kv_head, item().batch);
        }
        bulk_commit_group();
      }
    } else {
      const int64_t tile = (int64_t(item().batch) * p_.kv_heads + item().kv_head) * p_.key_tiles + item().key_tile;
      float* const to = p_.grad_key_sums + (tile * 2 * kKeys + index_ * kConsumerKeys) * kDim;
      add(grad_k, from, to);
      if (thread_ == 0) bulk_wait_group_read<0>();
      named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
      add(grad_v, from, to + kKeys * kDim);
    }
    if (thread_ == 0) shared_.item_slots.empty[slot()].arrive();
  }

  const BackwardParams& p_;
  const BackwardLaunch& launch_;
  BackwardShared<Tiling>& shared_;
  const int index_, thread_;
  const uint32_t k_;
  RowStage stage_;
  // Which buffer of grad_s is next, and above this bit the number of items so far.
  static constexpr uint32_t kItemTurn = 2;
  uint32_t turns_ = 0;
};

}  // namespace dflash::DFLASH_ISA::sm90
