// The consumers of values and of keys of the wide Hopper backward, a warpgroup each (backward_wide_sm90.cu).
#pragma once

#include "attn/sm90/backward_wide_tiling.h"
#include "attn/sm90/transposed_scores.h"
#include "attn/sm90/turns.h"
#include "common/named_barrier.h"

namespace dflash::DFLASH_ISA::sm90 {

// The consumer of values or, if kOfKeys, of keys. Both compute 64 x 64 scores, make weights of them, and multiply these
// with rows. kIsCapped: there is a softcap.
template <class T, class Tiling, bool kOfKeys, bool kIsCapped>
class WideKeyConsumer {
  static constexpr int kRows = Tiling::kRows, kKeys = Tiling::kConsumerKeys;
  static constexpr int kColumns = Tiling::kColumns, kHalf = kColumns / 2;
  static_assert(kRows == 64 && kKeys == 64 && Tiling::kStages == 2);
  using Scored = TransposedScores;
  using Weights = uint32_t[kRows / 16][4];
  using Sums = float[2][kHalf / 2];  // of each half of the columns
  using Writer = TileProducts<T, 64, kHalf, kHalf>;

 public:
  DFLASH_INLINE WideKeyConsumer(const BackwardParams& p, const BackwardLaunch& launch,
                                WideBackwardShared<Tiling>& shared, uint32_t memory)
      : p_(p), launch_(launch), shared_(shared), memory_(memory) {}

  DFLASH_INLINE void run() {
    if (kOfKeys) named_barrier_arrive(kProbabilitiesRead, 2 * kWarpgroup);
    for (;;) {
      shared_.kv_full.wait(turns_ / kItemTurn);
      if (item().key_tile < 0) break;
      work_on_item();
      turns_ ^= kItemTurn;
    }
    if (!kOfKeys) named_barrier_sync(kProbabilitiesRead, 2 * kWarpgroup);
  }

 private:
  // Rows are released before the next are waited for, because the other consumer's rows take the place of what this one
  // releases. After the last tile the scores are those of whatever shared memory holds, and nobody uses them: a product
  // that is skipped at times would make ptxas serialize all products.
  DFLASH_INLINE void work_on_item() {
    Sums sums = {};
    int left = item().end - item().begin;
    if (left > 0) {
      Scored s;
      Weights weights;
      wait_for_scored_rows();
      start_scores(s);
      wgmma_wait_group<0>();
      fence_accumulator(s);
      weigh(weights, s);
      do {
        const uint32_t used = stage();
        if (!kOfKeys) wait_for_gradients();
        start_sums(sums, weights);
        ++turns_;
        const bool has_next = --left > 0;
        wgmma_wait_group<0>();
#pragma unroll
        for (auto& half : sums) fence_accumulator(half);
        release(kOfKeys ? shared_.queries_empty[used] : shared_.gradients_empty);
        if (has_next) wait_for_scored_rows();
        start_scores(s);
        wgmma_wait_group<0>();
        fence_accumulator(s);
        if (has_next) weigh(weights, s);
      } while (left > 0);
    }
    write(sums);
  }

  // Registers are scarce, and so the numbers of the thread and the block are read again wherever they are needed.
  static DFLASH_INLINE int thread() { return opaque(threadIdx.x) % kWarpgroup; }
  static DFLASH_INLINE int rank() { return opaque(blockIdx.x) % Tiling::kBlocks; }
  static DFLASH_INLINE void release(Mbarrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
  }

  DFLASH_INLINE const BackwardItem& item() const { return shared_.items[turns_ / kItemTurn]; }
  DFLASH_INLINE uint32_t stage() const { return turns_ % Tiling::kStages; }
  DFLASH_INLINE uint32_t queries() const { return memory_ + Tiling::kQueriesAt + stage() * Tiling::kTileBytes; }
  DFLASH_INLINE uint32_t gradients() const { return memory_ + Tiling::kGradientsAt; }

  DFLASH_INLINE void wait_for_scored_rows() {
    shared_.queries_full[stage()].wait(turns_ / Tiling::kStages % 2);
    if (!kOfKeys) return;
    shared_.gradients_full.wait(turns_ % 2);
    if (shared_.units[stage()].has_empty) clear_empty_rows();
  }

  // The consumer of values needs the outputs' gradients only for its second product.
  DFLASH_INLINE void wait_for_gradients() {
    shared_.gradients_full.wait(turns_ % 2);
    if (shared_.units[stage()].has_empty) named_barrier_sync(kRowsCleared, 2 * kWarpgroup);
  }

  // Sets rows that see nothing to zero, because a NaN in them would reach keys through a product with zero. Their
  // scores may be NaN; the mask hides them.
  DFLASH_INLINE void clear_empty_rows() {
    const float* const lse = shared_.stats[stage()][0];
    for (int i = thread(); i < Tiling::kTileBytes / 16; i += kWarpgroup) {
      if (lse[i / 8 % kRows] == kInfinity) {
        write_shared(queries() + i * 16, make_uint4(0, 0, 0, 0));
        write_shared(gradients() + i * 16, make_uint4(0, 0, 0, 0));
      }
    }
    fence_proxy_async();
    named_barrier_arrive(kRowsCleared, 2 * kWarpgroup);
    named_barrier_sync(kOwnThreads + kOfKeys, kWarpgroup);
  }

  // Starts s = keys queries^T, or values gradients^T - delta, over the block's columns.
  DFLASH_INLINE void start_scores(Scored& s) const {
    if constexpr (kOfKeys) {
      const float* const delta = shared_.stats[stage()][1] + thread() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * j);
        constexpr float kShare = Tiling::kSplitsColumns ? -0.5f : -1;  // the blocks' parts are added
        s[4 * j] = s[4 * j + 2] = kShare * pair.x;
        s[4 * j + 1] = s[4 * j + 3] = kShare * pair.y;
      }
    }
    start_row_products<T, kRows, kColumns, Tiling::kPanelBytes, Tiling::kPanelBytes, kOfKeys>(
        s, memory_ + (kOfKeys ? Tiling::kValuesAt : 0), kOfKeys ? gradients() : queries());
    wgmma_commit_group();
  }

  // Starts sums += weights rows. An instruction for all columns would need more registers than a thread has at launch.
  DFLASH_INLINE void start_sums(Sums& sums, const Weights& weights) const {
    const uint32_t rows = kOfKeys ? queries() : gradients();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t own = opaque(rows + half * kHalf / kPanelColumns * Tiling::kPanelBytes);
      start_register_products<T, kHalf, kRows, Tiling::kPanelBytes>(sums[half], weights, own);
    }
    wgmma_commit_group();
  }

  // Makes weights of scores: probabilities, or gradients of the scores.
  DFLASH_INLINE void weigh(Weights& weights, Scored& s) const {
    if constexpr (kOfKeys) release(shared_.gradients_empty);
    if constexpr (Tiling::kSplitsColumns) add_other_columns(s);
    if constexpr (kOfKeys) {
      differentiate(s);
      round_to_fragments<T>(weights, s);
      hand_over(weights);
    } else {
      take_probabilities(s);
      publish(s);
      release(shared_.queries_empty[stage()]);
      round_to_fragments<T>(weights, s);
    }
  }

  // Sends s to the same thread of the other block, and adds what that one sends.
  DFLASH_INLINE void add_other_columns(Scored& s) const {
    const int other = 1 - rank();
    const uint32_t at = memory_ + Tiling::kOtherAt + kOfKeys * 2 * Tiling::kScoreBytes + thread() * 16;
    const uint32_t to = map_to_rank(at, other);
    Mbarrier &full = shared_.other_full[kOfKeys], &empty = shared_.other_empty[kOfKeys];
    empty.wait_cluster(turns_ % 2 ^ 1);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      write_remotely(to + j * kWarpgroup * 16, s[4 * j], s[4 * j + 1], s[4 * j + 2], s[4 * j + 3]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_remotely(map_to_rank(shared_address(&full), other));
    full.wait_cluster(turns_ % 2);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const uint4 part = read_shared(at + j * kWarpgroup * 16);
      s[4 * j] += __uint_as_float(part.x);
      s[4 * j + 1] += __uint_as_float(part.y);
      s[4 * j + 2] += __uint_as_float(part.z);
      s[4 * j + 3] += __uint_as_float(part.w);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_remotely(map_to_rank(shared_address(&empty), other));
  }

  // Scores become probabilities.
  DFLASH_INLINE void take_probabilities(Scored& s) const {
    const int thread = this->thread(), row = thread % 4 * 2;
    if constexpr (kIsCapped) shared_.scores(s);
    take_exponentials(s, shared_.stats[stage()][0] + row, kIsCapped ? 1 : launch_.factor);
    if (shared_.units[stage()].is_full) return;
    const int key = Tiling::first_key(item(), rank()) + thread / 32 * 16 + thread % 32 / 4;
    zero_unseen(s, shared_.keys[stage()], row, key, launch_.fold_bits);
  }

  // Each thread of the consumer of values writes its probabilities for the same thread of the consumer of keys. Under a
  // softcap they are multiplied by its derivative, which only dS needs.
  DFLASH_INLINE uint32_t probabilities() const { return memory_ + Tiling::kProbabilitiesAt + thread() * 16; }

  DFLASH_INLINE void publish(const Scored& s) const {
    const uint32_t to = probabilities();
    named_barrier_sync(kProbabilitiesRead, 2 * kWarpgroup);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      float x[4] = {s[4 * j], s[4 * j + 1], s[4 * j + 2], s[4 * j + 3]};
      if constexpr (kIsCapped) {
        const float* const lse = shared_.stats[stage()][0] + thread() % 4 * 2 + 8 * j;
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] *= slope_of_softcap(x[i], lse[i % 2]);
      }
      write_shared(to + j * kWarpgroup * 16, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                                        __float_as_uint(x[2]), __float_as_uint(x[3])));
    }
    named_barrier_arrive(kProbabilitiesWritten, 2 * kWarpgroup);
  }

  // The derivative of cap * tanh(x / cap), which is 1 - tanh^2. There are no registers to keep the capped scores in, so
  // they come from the probabilities again. A probability of zero gives a finite slope, here zero.
  DFLASH_INLINE float slope_of_softcap(float probability, float lse) const {
    const float tanh = fmaxf(__fdividef(__log2f(probability) + lse, shared_.scores.outer), -1.0f);
    return 1 - tanh * tanh;
  }

  // dP - delta becomes dS.
  DFLASH_INLINE void differentiate(Scored& grad_p) const {
    const uint32_t from = probabilities();
    named_barrier_sync(kProbabilitiesWritten, 2 * kWarpgroup);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const uint4 weights = read_shared(from + j * kWarpgroup * 16);
      grad_p[4 * j] *= __uint_as_float(weights.x);
      grad_p[4 * j + 1] *= __uint_as_float(weights.y);
      grad_p[4 * j + 2] *= __uint_as_float(weights.z);
      grad_p[4 * j + 3] *= __uint_as_float(weights.w);
    }
    named_barrier_arrive(kProbabilitiesRead, 2 * kWarpgroup);
  }

  // Gives dS^T, [keys, rows], to the consumer of queries, and to that of the other block if blocks split keys. Once
  // scores_empty is complete, they have read the tile before, and so the copy to the other block has ended, too.
  DFLASH_INLINE void hand_over(const Weights& grad_s) const {
    const int thread = this->thread(), key = thread / 32 * 16 + thread % 16, chunk = thread % 32 / 16;
    const uint32_t own = memory_ + Tiling::kScoresAt, to = own + key * kPanelRowBytes;
    shared_.scores_empty.wait(turns_ % 2 ^ 1);
#pragma unroll
    for (int pair = 0; pair < kRows / 16; ++pair) {
      const auto& x = grad_s[pair];
      stmatrix_x4(to + ((pair * 2 + chunk) ^ (key % 8)) * 16, x[0], x[1], x[2], x[3]);
    }
    fence_proxy_async();
    named_barrier_sync(kOwnThreads + kOfKeys, kWarpgroup);
    if (thread > 0) return;
    if constexpr (Tiling::kSplitsColumns) {
      shared_.scores_full.arrive();
    } else {
      const int other = 1 - rank();
      shared_.scores_full.arrive_and_expect_tx(Tiling::kScoreBytes);
      bulk_send(map_to_rank(memory_ + Tiling::kOtherAt, other), own, Tiling::kScoreBytes,
                map_to_rank(shared_address(&shared_.scores_full), other));
    }
  }

  DFLASH_INLINE void write(const Sums& sums) {
    named_barrier_sync(kKeysAreRead, 3 * kWarpgroup);
    if (item().part == BackwardPart::kWhole) {
      store(sums);
    } else {
      add(sums);
    }
  }

  // Writes dV where the values lay, or dK where the keys lay. From there TMA stores it.
  DFLASH_INLINE void store(const Sums& sums) {
    const float scale = kOfKeys ? static_cast<float>(p_.scale) : 1, scales[2] = {scale, scale};
    const uint32_t staged = opaque(memory_ + (kOfKeys ? 0 : Tiling::kValuesAt));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Writer::write_rows(staged + half * kHalf / kPanelColumns * Tiling::kPanelBytes, sums[half], scales,
                         opaque(threadIdx.x));
    }
    named_barrier_sync(kOwnThreads + kOfKeys, kWarpgroup);
    if (thread() == 0) {
      const BackwardItem& item = this->item();
      const CUtensorMap& map = kOfKeys ? launch_.grad_k : launch_.grad_v;
      const int column = Tiling::first_column(rank()), key = Tiling::first_key(item, rank());
      for (int panel = 0; panel < Tiling::kPanels; ++panel) {
        tma_store(map, staged + panel * Tiling::kPanelBytes, column + panel * kPanelColumns, key, item.kv_head,
                  item.batch);
      }
      bulk_commit_group();
      bulk_wait_group_read<0>();
      shared_.kv_empty.arrive();
    }
  }

  // Adds dV or dK to the sums in global memory. The next item's keys load meanwhile.
  DFLASH_INLINE void add(const Sums& sums) {
    const BackwardItem& item = this->item();
    const int64_t tile = (int64_t(item.batch) * p_.kv_heads + item.kv_head) * p_.key_tiles + item.key_tile;
    float* const to = p_.grad_key_sums +
                      ((tile * 2 + !kOfKeys) * Tiling::kBlocks + rank()) * (kKeys * kColumns) + thread() * 4;
    int32_t* const added = p_.keys_added + (tile * 2 + !kOfKeys) * Tiling::kBlocks + rank();
    if (p_.is_deterministic && thread() == 0) wait_for_turn(added, item.turn);
    named_barrier_sync(kOwnThreads + kOfKeys, kWarpgroup);  // all threads have read the item, and may add
    if (thread() == 0) shared_.kv_empty.arrive();
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float* const x = sums[j / (kHalf / 8)] + j % (kHalf / 8) * 4;
      red_add_v4(to + j * kWarpgroup * 4, x[0], x[1], x[2], x[3]);
    }
    if (!p_.is_deterministic) return;
    named_barrier_sync(kOwnThreads + kOfKeys, kWarpgroup);
    if (thread() == 0) count_up(added);
  }

  const BackwardParams& p_;
  const BackwardLaunch& launch_;
  WideBackwardShared<Tiling>& shared_;
  const uint32_t memory_;
  // Two counters in one register: of tiles of rows, and in the highest bit of items.
  static constexpr uint32_t kItemTurn = 1u << 31;
  uint32_t turns_ = 0;
};

}  // namespace dflash::DFLASH_ISA::sm90
