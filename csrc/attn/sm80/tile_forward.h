// The work of a block of the portable forward: one tile of query rows, past which its keys and values move.
#pragma once

#include "attn/plan_check.h"
#include "attn/sm80/forward_tiling.h"
#include "attn/sm80/row_chunks.h"
#include "attn/softmax.h"

namespace dflash::DFLASH_ISA::sm80 {

// The state of a thread while its block works on an item.
template <class T, class Tile>
class TileForward {
  static constexpr int kKeys = Tile::kKeys, kFragments = Tile::kFragments, kParts = Tile::kParts;
  static constexpr int kSteps = Tile::kWarpDim / 16, kKeySteps = kKeys / 16;
  // Scores are accumulators. Probabilities are rounded to A fragments, two neighbours in one word (common/mma.h).
  using ThreadScores = float[kFragments][kKeys / 2];
  using Probabilities = uint32_t[kFragments][kKeySteps][4];

 public:
  DFLASH_INLINE TileForward(const AttentionForwardParams& p, const ForwardLaunch& launch, ForwardShared<Tile>& shared)
      : p_(p),
        launch_(launch),
        shared_(shared),
        tiles_(shared_address(shared.tiles)),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        row_(warp_ / kParts * Tile::kWarpRows),
        part_bytes_(warp_ % kParts * Tile::kWarpDim * 2),
        query_pieces_(tiles_ + part_bytes_, row_ + lane_ % 16, lane_ / 16),
        key_pieces_(tiles_ + Tile::kKeysAt + part_bytes_, lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2),
        value_pieces_(tiles_ + Tile::kValuesAt + part_bytes_, lane_ % 16, lane_ / 16) {}

  DFLASH_INLINE void run() {
    const ForwardItem<kKeys> item(p_, launch_, blockIdx.x);
    if (threadIdx.x == 0) shared_.item = item;
    load_queries(item.rows);
    __syncthreads();
    check_plan();
    if (shared_.item.key_tiles.count() > 0) copy_keys(0);
    for (int tile = 0; tile < shared_.item.key_tiles.count(); ++tile) {
      cp_async_wait_group<0>();
      __syncthreads();  // the keys are there, and the last values have been used
      copy_values(tile);
      ThreadScores s = {};
      multiply_keys(s);
      cp_async_wait_group<0>();
      __syncthreads();  // the values are there, and the keys have been used
      if (tile + 1 < shared_.item.key_tiles.count()) copy_keys(tile + 1);
      add_partials(s);
      Probabilities probabilities;
      take_exponentials(s, shared_.item.key_tiles[tile], probabilities);
      multiply_values(probabilities);
    }
    cp_async_wait_group<0>();  // of the queries, where there are no keys
    __syncthreads();
    write();
  }

 private:
  DFLASH_INLINE bool is_inside(int chunk) const { return chunk * kChunkSize < static_cast<int>(p_.head_dim); }

  DFLASH_INLINE void load_queries(const TileRows& rows) {
    const CopyShare<Tile> share;
    const auto at = [&](int i) {
      return static_cast<const uint16_t*>(p_.q) + rows.offset(p_.q_strides, share.row + i) + share.chunk * kChunkSize;
    };
    const auto has = [&](int i) { return rows.has(share.row + i) && is_inside(share.chunk); };
    copy_rows<Tile, Tile::kRows>(tiles_, launch_.q_aligned, at, has);
    static_assert(Tile::kRows <= Tile::kThreads);
    if (const int row = threadIdx.x; row < Tile::kRows) {
      shared_.bounds[row] =
          rows.has(row) ? RowBounds(p_.mask, rows.batch, rows.position(row), static_cast<int>(p_.kv_len)) : RowBounds();
    }
    if constexpr (Tile::kKeepsQueries) {
      cp_async_wait_group<0>();
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) ldmatrix_x4(queries_[step], query_pieces_(0, step));
    }
  }

  DFLASH_INLINE void check_plan() {
    const PlanCheck check(shared_.item.plan);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      const RowBounds* own = &shared_.bounds[row_ + 16 * m + lane_ / 4];
#pragma unroll
      for (int r = 0; r < 2; ++r) softmax_[m].sum[r] = check.addend(own[8 * r]);
    }
  }

  DFLASH_INLINE void copy_keys(int tile) {
    copy(Tile::kKeysAt, tile, shared_.item.k, p_.k_strides.row, launch_.k_aligned);
  }
  DFLASH_INLINE void copy_values(int tile) {
    copy(Tile::kValuesAt, tile, shared_.item.v, p_.v_strides.row, launch_.v_aligned);
  }

  // Keys that no row sees are zeros, so that nothing they hold reaches a row.
  DFLASH_INLINE void copy(int to, int tile, const uint16_t* head, int64_t stride, bool aligned) {
    const CopyShare<Tile> share;
    const int key = shared_.item.key_tiles[tile] + share.row;
    const int hi = shared_.item.plan.hi[0], next_lo = shared_.item.plan.lo[1], next_hi = shared_.item.plan.hi[1];
    const uint16_t* from = head + key * stride + share.chunk * kChunkSize;
    const bool inside = is_inside(share.chunk);
    const auto at = [&](int i) { return from + i * stride; };
    const auto has = [&](int i) { return inside & ((key + i < hi) | ((key + i >= next_lo) & (key + i < next_hi))); };
    copy_rows<Tile, kKeys>(tiles_ + to, aligned, at, has);
  }

  // s = q k^T; with kParts > 1 over the warp's columns, for the other warp of the same rows to add.
  DFLASH_INLINE void multiply_keys(ThreadScores& s) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kFragments][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        if constexpr (Tile::kKeepsQueries) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = queries_[step][i];
        } else {
          ldmatrix_x4(a[m], query_pieces_(m, step));
        }
      }
#pragma unroll
      for (int n = 0; n < kKeySteps; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, key_pieces_(n, step));
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(s[m][8 * n]), a[m], b[0], b[1]);
          mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(s[m][8 * n + 4]), a[m], b[2], b[3]);
        }
      }
    }
    if constexpr (kParts > 1) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        *partial(warp_, i) = make_float4(s[0][4 * i], s[0][4 * i + 1], s[0][4 * i + 2], s[0][4 * i + 3]);
      }
    }
  }

  DFLASH_INLINE void add_partials(ThreadScores& s) {
    if constexpr (kParts > 1) {
      static_assert(kParts == 2 && kFragments == 1);
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        const float4 other = *partial(warp_ ^ 1, i);
        s[0][4 * i] += other.x;
        s[0][4 * i + 1] += other.y;
        s[0][4 * i + 2] += other.z;
        s[0][4 * i + 3] += other.w;
      }
    }
  }
  DFLASH_INLINE float4* partial(int warp, int i) { return &shared_.partials[(warp * (kKeys / 8) + i) * 32 + lane_]; }

  // Scores become exponentials, and earlier outputs shrink where a row's maximum has grown.
  DFLASH_INLINE void take_exponentials(ThreadScores& s, int first_key, Probabilities& probabilities) {
    const Scores& scores = shared_.item.scores;
    const bool is_full = shared_.item.key_tiles.is_full(first_key);
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      scores(s[m]);
      if (!is_full) {
        const RowBounds* own = &shared_.bounds[row_ + 16 * m + lane_ / 4];
        hide(s[m], {own[0], own[8]}, first_key);
      }
      const float before[2] = {softmax_[m].largest[0], softmax_[m].largest[1]};
      float correction[2];
      softmax_[m].add(s[m], scores.factor, correction);
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) probabilities[m][i / 4][i % 4] = pack<T>(s[m][2 * i], s[m][2 * i + 1]);
      // Maxima soon stop growing, so a branch skips the rescaling. With one block a multiprocessor the branch costs
      // more than it saves: it keeps the exponentials from running under the matrix products that follow.
      const bool has_grown = before[0] != softmax_[m].largest[0] || before[1] != softmax_[m].largest[1];
      if (Tile::kMinBlocks == 1 || __any_sync(~0u, has_grown)) {
#pragma unroll
        for (int n = 0; n < Tile::kWarpDim / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) o_[m][n][i] *= correction[i / 2];
        }
      }
    }
  }

  DFLASH_INLINE void multiply_values(const Probabilities& a) {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int n = 0; n < Tile::kWarpDim / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, value_pieces_(step, n));
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          mma_m16n8k16<T>(o_[m][2 * n], a[m][step], b[0], b[1]);
          mma_m16n8k16<T>(o_[m][2 * n + 1], a[m][step], b[2], b[3]);
        }
      }
    }
  }

  // Outputs go through shared memory, to be written as whole rows.
  DFLASH_INLINE void write() {
    const TileRows rows = shared_.item.rows;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      float inverse[2], lse[2];
      softmax_[m].finish(shared_.item.scores.factor, inverse, lse);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_ + 16 * m + 8 * r + lane_ / 4;
#pragma unroll
        for (int n = 0; n < Tile::kWarpDim / 8; ++n) {
          *reinterpret_cast<uint32_t*>(shared_.tiles + part_bytes_ + chunk_offset<Tile>(row, n) + lane_ % 4 * 4) =
              pack<T>(o_[m][n][2 * r] * inverse[r], o_[m][n][2 * r + 1] * inverse[r]);
        }
        if (p_.lse && lane_ % 4 == 0 && warp_ % kParts == 0 && rows.has(row)) {
          const int64_t head = rows.batch * p_.heads + rows.head_of(row);
          static_cast<float*>(p_.lse)[head * p_.q_len + rows.position(row)] = lse[r];
        }
      }
    }
    __syncthreads();
    const CopyShare<Tile> share;
    const auto at = [&](int row) {
      return static_cast<uint16_t*>(p_.out) + rows.offset(p_.out_strides, row) + share.chunk * kChunkSize;
    };
    write_rows<Tile, Tile::kRows>(shared_.tiles, launch_.out_aligned, at,
                                  [&](int row) { return rows.has(row) && is_inside(share.chunk); });
  }

  const AttentionForwardParams& p_;
  const ForwardLaunch& launch_;
  ForwardShared<Tile>& shared_;
  const uint32_t tiles_;
  const int lane_, warp_, row_, part_bytes_;
  const Pieces<Tile> query_pieces_, key_pieces_, value_pieces_;
  uint32_t queries_[Tile::kKeepsQueries ? kSteps : 1][4];
  OnlineSoftmax softmax_[kFragments];
  float o_[kFragments][Tile::kWarpDim / 8][4] = {};
};

}  // namespace dflash::DFLASH_ISA::sm80
