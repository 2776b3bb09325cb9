// A consumer of the Hopper backward: a warpgroup that owns 64 of the keys in shared memory.
#pragma once

#include "attn/sm90/backward_rounding.h"
#include "attn/sm90/backward_tiling.h"
#include "attn/sm90/transposed_scores.h"
#include "attn/sm90/turns.h"
#include "common/named_barrier.h"

namespace dflash::DFLASH_ISA::sm90 {

// kIsCapped: the scores have a softcap.
template <class T, class Tiling, bool kIsCapped>
class BackwardConsumer {
  static constexpr int kRows = Tiling::kRows, kKeys = Tiling::kKeys, kDim = Tiling::kDim;
  static constexpr int kConsumers = Tiling::kConsumers, kConsumerKeys = Tiling::kConsumerKeys;
  static constexpr int kColumns = Tiling::kGradQColumns;
  static constexpr int kHalves = Tiling::kHalves;
  using Half = TransposedScores;  // the consumer's keys with 64 rows
  using Scored = Half[kHalves];
  using Weights = uint32_t[4][4];  // the same, rounded
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
    round_sections(static_cast<int>(p_.sections));
    if (thread_ == 0) bulk_wait_group_read<0>();
  }

 private:
  DFLASH_INLINE void work_on_item() {
    Sums grad_k = {}, grad_v = {};
    int left = item().end - item().begin;
    if (left > 0) {
      Scored s;
      wait_for_rows();
      start_scores(s);
      vacate_output();  // of the item before
      wgmma_wait_group<0>();
      fence_scores(s);
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
    Weights weights[kHalves], grad_s[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      Half grad_p;
      start_grad_p(grad_p, half);
      take_probabilities(s[half], half);
      round_to_fragments<T>(weights[half], s[half]);
      start_grad_v(grad_v, weights[half], half);
      wgmma_wait_group<1>();
      fence_accumulator(grad_p);
      differentiate(grad_p, s[half], half);
      round_to_fragments<T>(grad_s[half], grad_p);
      hand_over(grad_s[half], half);
      if constexpr (Tiling::kKeysFromRegisters) start_grad_k(grad_k, grad_s[half], half);
    }
    // Two buffers of dS take turns: when both consumers have come here again, both have used the other buffer.
    fence_proxy_async();
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
    GradQ grad_q;
    start_grad_q(grad_q);
    const RowStage used = stage_;
    if constexpr (!Tiling::kKeysFromRegisters) {
      start_grad_k(grad_k);
      wgmma_wait_group<1>();
      fence_accumulator(grad_q);
      hand_over_grad_q(grad_q);
    }
    stage_.advance();
    if (has_next) wait_for_rows();
    start_scores(s);
    wgmma_wait_group<1>();
    if (threadIdx.x % 32 == 0) shared_.rows.empty[used.index].arrive();
    if constexpr (Tiling::kKeysFromRegisters) {
      fence_accumulator(grad_q);
      hand_over_grad_q(grad_q);
    }
    turns_ ^= 1;
    wgmma_wait_group<0>();
    fence_scores(s);
    fence_accumulator(grad_k);
    fence_accumulator(grad_v);
  }

  DFLASH_INLINE int slot() const { return turns_ / kItemTurn % kItemSlots; }
  DFLASH_INLINE const BackwardItem& item() const { return shared_.items[slot()]; }

  // Where things lie: all at constant distances from the keys, because registers are scarce.
  DFLASH_INLINE uint32_t values() const { return k_ + Tiling::kValuesAt; }
  DFLASH_INLINE uint32_t queries() const { return k_ + Tiling::kRowsAt + stage_.index * 2 * Tiling::kRowBytes; }
  DFLASH_INLINE uint32_t gradients() const { return queries() + Tiling::kRowBytes; }
  DFLASH_INLINE uint32_t scores_at() const { return k_ + Tiling::kScoresAt + (turns_ & 1) * Tiling::kScoreBytes; }

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

  // Starts s = k q^T.
  DFLASH_INLINE void start_scores(Scored& s) const {
    start_row_products<T, kRows, kDim, kKeys * kPanelRowBytes, kRows * kPanelRowBytes>(
        reinterpret_cast<float(&)[kRows / 2]>(s), k_ + index_ * kQueryPanelBytes, queries());
    wgmma_commit_group();
  }

  static DFLASH_INLINE void fence_scores(Scored& s) { fence_accumulator(reinterpret_cast<float(&)[kRows / 2]>(s)); }

  // Starts grad_p = v grad_out^T.
  DFLASH_INLINE void start_grad_p(Half& grad_p, int half) const {
    start_row_products<T, 64, kDim, kKeys * kPanelRowBytes, kRows * kPanelRowBytes>(
        grad_p, values() + index_ * kQueryPanelBytes, gradients() + half * kQueryPanelBytes);
    wgmma_commit_group();
  }

  // Starts grad_v += probabilities^T grad_out.
  DFLASH_INLINE void start_grad_v(Sums& sums, const Weights& weights, int half) const {
    start_register_products<T, kDim, 64, kRows * kPanelRowBytes>(sums, weights,
                                                                 opaque(gradients() + half * kQueryPanelBytes));
    wgmma_commit_group();
  }

  // Starts grad_k += grad_s q with grad_s in registers.
  DFLASH_INLINE void start_grad_k(Sums& sums, const Weights& grad_s, int half) const {
    start_register_products<T, kDim, 64, kRows * kPanelRowBytes>(sums, grad_s,
                                                                 opaque(queries() + half * kQueryPanelBytes));
    wgmma_commit_group();
  }

  // The same with grad_s in shared memory.
  DFLASH_INLINE void start_grad_k(Sums& sums) const {
    static_assert(kRows == 64);
    fence_accumulator(sums);
    wgmma_fence();
    const uint64_t a = k_major_descriptor(opaque(scores_at() + index_ * kConsumerKeys * kPanelRowBytes));
    const uint64_t b = mn_major_descriptor(opaque(queries()), kRows * kPanelRowBytes);
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step) {
      const int row = step * 16 * kPanelRowBytes / 16;
      Wgmma<T, kDim>::template ss<kMajorK, kMajorMN>(sums, a + step * 32 / 16, b + row, true);
    }
    wgmma_commit_group();
  }

  // Starts grad_q = grad_s^T k, for the consumer's rows and columns.
  DFLASH_INLINE void start_grad_q(GradQ& grad_q) const {
    fence_accumulator(grad_q);
    wgmma_fence();
    const int row = kRows == 64 ? 0 : index_ * 64, column = kRows == 64 ? index_ * kColumns : 0;
    const uint64_t a =
        mn_major_descriptor(opaque(scores_at() + row / 64 * kKeys * kPanelRowBytes), kKeys * kPanelRowBytes);
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

  // Scores become probabilities.
  DFLASH_INLINE void take_probabilities(Half& s, int half) const {
    const int row = half * 64 + thread_ % 4 * 2;
    if constexpr (kIsCapped) shared_.scores(s);
    take_exponentials(s, shared_.stats[stage_.index][0] + row, kIsCapped ? 1.0f : launch_.factor);
    if (shared_.units[stage_.index].is_full) return;
    const int key = item().key_tile * kKeys + index_ * kConsumerKeys + thread_ / 32 * 16 + thread_ % 32 / 4;
    zero_unseen(s, shared_.keys[stage_.index], row, key, launch_.fold_bits);
  }

  // grad_p becomes the gradient of the scores, given the probabilities.
  DFLASH_INLINE void differentiate(Half& grad_p, const Half& probabilities, int half) const {
    const float* const delta = shared_.stats[stage_.index][1] + half * 64 + thread_ % 4 * 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * j);
      grad_p[4 * j] = probabilities[4 * j] * (grad_p[4 * j] - pair.x);
      grad_p[4 * j + 1] = probabilities[4 * j + 1] * (grad_p[4 * j + 1] - pair.y);
      grad_p[4 * j + 2] = probabilities[4 * j + 2] * (grad_p[4 * j + 2] - pair.x);
      grad_p[4 * j + 3] = probabilities[4 * j + 3] * (grad_p[4 * j + 3] - pair.y);
      if constexpr (kIsCapped) {
        const float* const lse = shared_.stats[stage_.index][0] + half * 64 + thread_ % 4 * 2 + 8 * j;
#pragma unroll
        for (int i = 0; i < 4; ++i) grad_p[4 * j + i] *= slope_of_softcap(probabilities[4 * j + i], lse[i % 2]);
      }
    }
  }

  // The derivative of cap * tanh(x / cap), which is 1 - tanh^2. There are no registers to keep the capped scores in, so
  // they come from the probabilities again. A probability of zero gives a finite slope, here zero.
  DFLASH_INLINE float slope_of_softcap(float probability, float lse) const {
    const float tanh = fmaxf((__log2f(probability) + lse) * launch_.inverse_cap, -1.0f);
    return 1 - tanh * tanh;
  }

  // Writes the gradients of the scores to shared memory, where both consumers read them: panels of 64 rows of the tile,
  // and in each [keys, rows].
  DFLASH_INLINE void hand_over(const Weights& grad_s, int half) const {
    const int key = index_ * kConsumerKeys + thread_ / 32 * 16 + thread_ % 16, chunk = thread_ % 32 / 16;
    const uint32_t to = scores_at() + (half * kKeys + key) * kPanelRowBytes;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t(&x)[4] = grad_s[pair];
      stmatrix_x4(to + ((pair * 2 + chunk) ^ (key % 8)) * 16, x[0], x[1], x[2], x[3]);
    }
  }

  // Waits until both consumers are here, and the copy engine has read what they gave to it.
  DFLASH_INLINE void vacate_output() const {
    wait_for_grad_q();
    if (thread_ == 0) bulk_wait_group_read<0>();
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
  }

  // Hands the consumer's columns of dQ to the producer's thread that adds them to the sums in global memory.
  DFLASH_INLINE void hand_over_grad_q(const GradQ& grad_q) const {
    wait_for_grad_q();
    write_floats(grad_q, k_ + Tiling::kGradQAt + index_ * (64 * kColumns * 4));
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared_.grad_q_full.arrive();
  }

  // Waits until the dQ of the tile of rows before has been read.
  DFLASH_INLINE void wait_for_grad_q() const { shared_.grad_q_empty.wait(~turns_ & 1); }

  // Writes an accumulator to shared memory, where the copy engine finds it.
  template <int kCount>
  DFLASH_INLINE void write_floats(const float (&x)[kCount], uint32_t to) const {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      write_shared(to + (j * kWarpgroup + thread_) * 16,
                   make_uint4(__float_as_uint(x[4 * j]), __float_as_uint(x[4 * j + 1]), __float_as_uint(x[4 * j + 2]),
                              __float_as_uint(x[4 * j + 3])));
    }
    fence_proxy_async();
  }

  // ---- the end of an item

  // The next item's keys load meanwhile.
  DFLASH_INLINE void write(Sums& grad_k, Sums& grad_v) {
    if (threadIdx.x % 32 == 0) shared_.kv_empty.arrive();
    vacate_output();
    const BackwardPart part = item().part;
    if (part != BackwardPart::kWhole) exchange(grad_k, grad_v, part);
    if (part == BackwardPart::kWhole || part == BackwardPart::kFinal) store(grad_k, grad_v);
    const bool ends_section = item().is_last;
    const int section = section_of(item());
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
    if (thread_ == 0) shared_.item_slots.empty[slot()].arrive();
    if (!ends_section) return;
    // All blocks have long ended the section before.
    if (index_ == 0 && thread_ == 0) count_up(p_.sections_added + section);
    round_sections(section);
  }

  DFLASH_INLINE int section_of(const BackwardItem& item) const {
    return static_cast<int>((item.batch * p_.kv_heads + item.kv_head) / p_.section_heads);
  }

  // Takes the block's part in rounding the sums of dQ of all sections before `end`.
  DFLASH_INLINE void round_sections(int end) const {
    const int heads = static_cast<int>(p_.batch * p_.kv_heads), row_tiles = static_cast<int>(p_.row_tiles);
    for (int section = shared_.rounded_sections; section < end; ++section) {
      if (thread_ == 0) wait_for_turn(p_.sections_added + section, static_cast<int>(p_.blocks));
      named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
      const int first_head = section * static_cast<int>(p_.section_heads);
      const int end_head = min(first_head + static_cast<int>(p_.section_heads), heads);
      const int last = end_head * launch_.groups_per_head * row_tiles;
#pragma unroll 1
      for (int index = first_head * launch_.groups_per_head * row_tiles + blockIdx.x * kConsumers + index_;
           index < last; index += gridDim.x * kConsumers) {
        round_grad_q<T, Tiling>(p_, launch_, index);
      }
    }
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);  // all threads have read it
    if (index_ == 0 && thread_ == 0) shared_.rounded_sections = end;
    named_barrier_sync(kConsumersBarrier, kConsumers * kWarpgroup);
  }

  DFLASH_INLINE uint32_t output() const { return k_ + Tiling::kOutputAt + index_ * Tiling::kOutputBytes; }

  // Adds dK and dV of a part of a tile of keys to the sums in global memory. Those of the final part become the sums.
  DFLASH_INLINE void exchange(Sums& grad_k, Sums& grad_v, BackwardPart part) const {
    const int64_t tile = (int64_t(item().batch) * p_.kv_heads + item().kv_head) * p_.key_tiles + item().key_tile;
    float* const k_sums = p_.grad_key_sums + (tile * 2 * kKeys + index_ * kConsumerKeys) * kDim;
    float* const v_sums = k_sums + kKeys * kDim;
    int32_t* const added = p_.keys_added + tile * 4 + index_;
    if (thread_ == 0) wait_for_turn(added, item().turn);
    if (part == BackwardPart::kFinal) {
      named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
      take_sums(grad_k, k_sums);
      take_sums(grad_v, v_sums);
    } else {
      put(grad_k, k_sums, part);
      if (thread_ == 0) bulk_wait_group_read<0>();
      named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
      put(grad_v, v_sums, part);
      if (thread_ == 0) end_turn(added);
    }
  }

  DFLASH_INLINE void put(const Sums& own, float* sums, BackwardPart part) const {
    write_floats(own, output());
    named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
    if (thread_ == 0) put_sums<kConsumerKeys * kDim>(sums, output(), part == BackwardPart::kFirst);
  }

  DFLASH_INLINE void take_sums(Sums& own, const float* sums) const {
    const auto* const from = reinterpret_cast<const float4*>(sums) + thread_;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const float4 x = __ldcg(from + j * kWarpgroup);
      own[4 * j] += x.x;
      own[4 * j + 1] += x.y;
      own[4 * j + 2] += x.z;
      own[4 * j + 3] += x.w;
    }
  }

  // Rounds dK and dV, and stores them by TMA.
  DFLASH_INLINE void store(const Sums& grad_k, const Sums& grad_v) const {
    const float scale = static_cast<float>(p_.scale), scales[2] = {scale, scale}, ones[2] = {1, 1};
    constexpr int kValuesFrom = Tiling::kPanels * kQueryPanelBytes;
    Writer::write_rows(output(), grad_k, scales);
    Writer::write_rows(output() + kValuesFrom, grad_v, ones);
    named_barrier_sync(kConsumerBarrier + index_, kWarpgroup);
    if (thread_ != 0) return;
    const int key = item().key_tile * kKeys + index_ * kConsumerKeys;
    for (int panel = 0; panel < Tiling::kPanels; ++panel) {
      const uint32_t from = output() + panel * kQueryPanelBytes;
      tma_store(launch_.grad_k, from, panel * kPanelColumns, key, item().kv_head, item().batch);
      tma_store(launch_.grad_v, from + kValuesFrom, panel * kPanelColumns, key, item().kv_head, item().batch);
    }
    bulk_commit_group();
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
