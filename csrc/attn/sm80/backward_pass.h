// One pass of the portable backward. What is still lies in registers, 16 rows a warp, and what moves arrives in two
// stages of shared memory.
#pragma once

#include "attn/sm80/backward_tiling.h"

namespace dflash::DFLASH_ISA::sm80 {

// One block of either pass: the state of a thread.
template <class T, class Tile>
class BackwardPass {
  static constexpr bool kOfKeys = Tile::kOfKeys;
  static constexpr int kMoving = Tile::kMoving, kWidth = Tile::kWidth, kStill = Tile::kStill, kParts = Tile::kParts;
  static constexpr int kSteps = Tile::kWarpDim / 16, kMovingSteps = kWidth / 16;
  using Products = float[kWidth / 2];         // an accumulator of 16 still rows with what moves (common/mma.h)
  using Rounded = uint32_t[kMovingSteps][4];  // the same, rounded to A fragments
  using Fragments = uint32_t[kSteps][4];      // of 16 still rows
  using Sums = float[Tile::kWarpDim / 8][4];

 public:
  DFLASH_INLINE BackwardPass(const BackwardParams& p, const BackwardLaunch& launch, BackwardShared<Tile>& shared)
      : p_(p),
        launch_(launch),
        shared_(shared),
        tiles_(shared_address(shared.tiles)),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        row_(warp_ / kParts * 16),
        part_bytes_(warp_ % kParts * Tile::kWarpDim * 2) {
    const unsigned heads = kOfKeys ? p.kv_heads : launch.groups;
    const unsigned count = gridDim.x / heads / static_cast<unsigned>(p.batch);
    const unsigned tile = blockIdx.x / heads / static_cast<unsigned>(p.batch);
    batch_ = blockIdx.x / heads % static_cast<unsigned>(p.batch);
    head_ = blockIdx.x % heads;
    // Under causal masks the first keys have the most rows, and the last rows have the most keys. Those blocks start
    // first.
    first_ = static_cast<int>(kOfKeys ? tile : count - 1 - tile) * kStill;
  }

  DFLASH_INLINE void run() {
    if (threadIdx.x == 0) {
      shared_.scores = Scores(p_);
      shared_.walk = make_walk();
    }
    load_still(Tile::kAddsGradQ ? still_keys() : tiles_, first_source(), first_aligned(), a_);
    load_still(tiles_, second_source(), second_aligned(), b_);
    if constexpr (!kOfKeys) load_row_facts();
    find(0);
    find(1);
    __syncthreads();
    if (moving(0).exists) copy(0, moving(0));
    int i = 0;
    for (; moving(i).exists; ++i) {
      const int stage = i & 1;
      cp_async_wait_group<0>();
      __syncthreads();  // the stage has arrived, and the other stage has been read and its grad_s written
      if (moving(i + 1).exists) copy(stage ^ 1, moving(i + 1));
      find(i + 2);
      if (kOfKeys && moving(i).has_empty) clear_empty_rows(stage);
      // Half of the warps add the gradients of the tile before first, so that exponentials of some warps run beside
      // products of others.
      const bool adds_first = warp_ < Tile::kThreads / 64;
      if (i > 0 && adds_first) add_grad_q(i - 1);
#pragma unroll 1
      for (int column = 0; column < kMoving; column += kWidth) work_on(stage, column, moving(i));
      if (i > 0 && !adds_first) add_grad_q(i - 1);
    }
    if (Tile::kAddsGradQ && i > 0) {
      __syncthreads();
      add_grad_q(i - 1);
    }
    write();
  }

 private:
  DFLASH_INLINE bool is_inside(int chunk) const { return chunk * kChunkSize < static_cast<int>(p_.head_dim); }

  // ---- where rows and keys lie. The rows of a head group are numbered head by head within a position.

  DFLASH_INLINE int row_tiles() const { return static_cast<int>(p_.row_tiles); }
  DFLASH_INLINE int64_t entry() const { return p_.entries == 1 ? 0 : batch_; }
  DFLASH_INLINE int position_of(int row) const { return row >> launch_.fold_bits; }
  DFLASH_INLINE int64_t row_offset(const HeadStrides& strides, int group, int row) const {
    const int head = (group << launch_.fold_bits) + (row & ((1 << launch_.fold_bits) - 1));
    return batch_ * strides.batch + head * strides.head + position_of(row) * strides.row;
  }
  DFLASH_INLINE int64_t key_offset(const HeadStrides& strides, int key) const {
    return batch_ * strides.batch + key_head() * strides.head + key * strides.row;
  }
  DFLASH_INLINE int key_head() const { return kOfKeys ? head_ : head_ / launch_.groups_of_key_head; }
  DFLASH_INLINE bool has_row(int row) const { return position_of(row) < static_cast<int>(p_.q_len); }
  DFLASH_INLINE bool has_key(int key) const { return key < static_cast<int>(p_.kv_len); }
  // The LSEs and deltas of the tile of rows that begins at row `first` of the group.
  DFLASH_INLINE const float* stats_of(int group, int first) const {
    return p_.stats + 2 * first +
           (batch_ * launch_.groups + group) * (int64_t(row_tiles()) * 2 * Tile::kTileRows);
  }
  DFLASH_INLINE const RowKeys* keys_of_rows() const {
    return p_.keys + entry() * row_tiles() * (Tile::kTileRows >> launch_.fold_bits);
  }

  // ---- what is still: keys and values, or queries and the outputs' gradients

  DFLASH_INLINE uint32_t still_keys() const { return shared_address(shared_.still_keys); }
  DFLASH_INLINE const void* first_source() const { return kOfKeys ? p_.k : p_.q; }
  DFLASH_INLINE const void* second_source() const { return kOfKeys ? p_.v : p_.grad_out; }
  DFLASH_INLINE bool first_aligned() const { return kOfKeys ? launch_.k_aligned : launch_.q_aligned; }
  DFLASH_INLINE bool second_aligned() const { return kOfKeys ? launch_.v_aligned : launch_.grad_out_aligned; }

  DFLASH_INLINE void load_still(uint32_t to, const void* source, bool aligned, Fragments& fragments) {
    const CopyShare<Tile> share;
    const HeadStrides& strides = source == first_source() ? (kOfKeys ? p_.k_strides : p_.q_strides)
                                                          : (kOfKeys ? p_.v_strides : p_.grad_out_strides);
    const auto at = [&](int i) {
      const int row = first_ + share.row + i;
      const int64_t offset = kOfKeys ? key_offset(strides, row) : row_offset(strides, head_, row);
      return static_cast<const uint16_t*>(source) + offset + share.chunk * kChunkSize;
    };
    const auto has = [&](int i) {
      const int row = first_ + share.row + i;
      return (kOfKeys ? has_key(row) : has_row(row)) && is_inside(share.chunk);
    };
    copy_rows<Tile, kStill>(to, aligned, at, has);
    cp_async_wait_group<0>();
    __syncthreads();
    const Pieces<Tile> pieces(to + part_bytes_, row_ + lane_ % 16, lane_ / 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ldmatrix_x4(fragments[step], pieces(0, step));
    __syncthreads();
  }

  // Loads LSEs and deltas of the thread's two still rows, and the bounds of all still rows.
  DFLASH_INLINE void load_row_facts() {
    const int rows = row_tiles() * Tile::kTileRows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_ + row_ + 8 * r + lane_ / 4;
      const int in_tile = row % Tile::kTileRows;
      const float* const stats = stats_of(head_, row - in_tile) + in_tile;
      lse_[r] = row < rows ? stats[0] : kInfinity;
      delta_[r] = row < rows ? stats[Tile::kTileRows] : 0;
    }
    if (const int row = threadIdx.x; row < kStill) {
      shared_.keys[0][row] = first_ + row < rows ? keys_of_rows()[position_of(first_ + row)] : RowKeys{};
    }
  }

  // ---- what moves

  DFLASH_INLINE const Moving& moving(int i) const { return shared_.moving[i]; }

  // The first warp finds tile i.
  DFLASH_INLINE void find(int i) {
    if (warp_ == 0) shared_.walk.template find<Tile::kTileRows>(i, shared_.moving);
  }

  DFLASH_INLINE BackwardWalk<Tile> make_walk() const {
    const RowTile* const tiles = p_.tiles + entry() * row_tiles();
    if constexpr (kOfKeys) {
      const int end = min(first_ + kStill, static_cast<int>(p_.kv_len));
      return RowTiles(tiles, row_tiles(), launch_.groups_of_key_head, first_, end);
    } else {
      const int tile = first_ / Tile::kTileRows;
      return BackwardWalk<Tile>(tiles + tile, min(kStill / Tile::kTileRows, row_tiles() - tile));
    }
  }

  DFLASH_INLINE void copy(int stage, const Moving& moving) {
    const uint32_t to = tiles_ + stage * 2 * Tile::kMovingBytes;
    if constexpr (kOfKeys) {
      const int group = head_ * launch_.groups_of_key_head + moving.group;
      const auto copy_tensor = [&](uint32_t to, const void* data, const HeadStrides& strides, bool aligned) {
        const CopyShare<Tile> share;
        const auto at = [&](int i) {
          return static_cast<const uint16_t*>(data) + row_offset(strides, group, moving.first + share.row + i) +
                 share.chunk * kChunkSize;
        };
        const auto has = [&](int i) { return has_row(moving.first + share.row + i) && is_inside(share.chunk); };
        copy_rows<Tile, kMoving>(to, aligned, at, has);
      };
      if (const int i = threadIdx.x; i < kMoving / 2) {
        cp_async(shared_address(&shared_.stats[stage][4 * i]), stats_of(group, moving.first) + 4 * i);
      } else if (const int i = static_cast<int>(threadIdx.x) - 128; i >= 0 && i < kMoving >> launch_.fold_bits) {
        cp_async(shared_address(&shared_.keys[stage][i]), keys_of_rows() + position_of(moving.first) + i);
      }
      copy_tensor(to, p_.q, p_.q_strides, launch_.q_aligned);
      copy_tensor(to + Tile::kMovingBytes, p_.grad_out, p_.grad_out_strides, launch_.grad_out_aligned);
    } else {
      const auto copy_tensor = [&](uint32_t to, const void* data, const HeadStrides& strides, bool aligned) {
        const CopyShare<Tile> share;
        const auto at = [&](int i) {
          return static_cast<const uint16_t*>(data) + key_offset(strides, moving.first + share.row + i) +
                 share.chunk * kChunkSize;
        };
        const auto has = [&](int i) {
          return shared_.walk.has(moving.first + share.row + i) && is_inside(share.chunk);
        };
        copy_rows<Tile, kMoving>(to, aligned, at, has);
      };
      copy_tensor(to, p_.k, p_.k_strides, launch_.k_aligned);
      copy_tensor(to + Tile::kMovingBytes, p_.v, p_.v_strides, launch_.v_aligned);
    }
  }

  // Sets rows that see nothing to zero, because a NaN in them would reach keys through a product with zero.
  DFLASH_INLINE void clear_empty_rows(int stage) {
    const CopyShare<Tile> share;
    for (int row = share.row; row < kMoving; row += share.kStep) {
      if (shared_.stats[stage][row] != kInfinity) continue;
      for (int tensor = 0; tensor < 2; ++tensor) {
        write_shared(tiles_ + (stage * 2 + tensor) * Tile::kMovingBytes + chunk_offset<Tile>(row, share.chunk), {});
      }
    }
    __syncthreads();
  }

  // ---- products

  // Adds the contributions of kWidth moving rows or keys, from `column` on.
  DFLASH_INLINE void work_on(int stage, int column, const Moving& moving) {
    const uint32_t first = tiles_ + stage * 2 * Tile::kMovingBytes + column * Tile::kRowBytes + part_bytes_;
    const uint32_t second = first + Tile::kMovingBytes;
    Products s = {}, grad_p = {};
    multiply_rows(s, grad_p, first, second);
    add_partials(s, grad_p, column);
    differentiate(s, grad_p, stage, column, moving);
    Rounded probabilities, grad_s;
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
      if (kOfKeys) probabilities[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
      grad_s[i / 4][i % 4] = pack<T>(grad_p[2 * i], grad_p[2 * i + 1]);
    }
    if constexpr (kOfKeys) multiply_columns(second_sums_, probabilities, second);
    multiply_columns(first_sums_, grad_s, first);
    if constexpr (Tile::kAddsGradQ) {
#pragma unroll
      for (int i = 0; i < kWidth / 4; ++i) {
        const int key = row_ + lane_ / 4 + i % 2 * 8, row = column + i / 2 * 8 + lane_ % 4 * 2;
        *reinterpret_cast<uint32_t*>(shared_.grad_s[stage] + key * Tile::kScoresPitch + row * 2) = grad_s[i / 4][i % 4];
      }
    }
  }

  // Adds the warp's part of dQ = dS k to the sums of tile i of rows. It comes one tile late, so that a tile needs no
  // barrier of its own between dS and dQ.
  DFLASH_INLINE void add_grad_q(int i) {
    if constexpr (!Tile::kAddsGradQ) return;
    constexpr int kColumns = Tile::kGradQColumns, kColumnWarps = Tile::kHeadDim / kColumns;
    const int row = warp_ / kColumnWarps * 16, piece = warp_ % kColumnWarps * (kColumns / 16);
    // Lane l gives the address of key l % 8 in matrix l / 8 of 8 keys and 8 rows. Matrices 1 and 3 have the later rows.
    const uint32_t scores = shared_address(shared_.grad_s[i & 1]) + (lane_ / 16 * 8 + lane_ % 8) * Tile::kScoresPitch +
                            (row + lane_ / 8 % 2 * 8) * 2;
    const Pieces<Tile> keys(still_keys(), lane_ % 16, lane_ / 16);
    float sums[kColumns / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kStill / 16; ++step) {
      uint32_t a[4], b[4];
      ldmatrix_x4_trans(a, scores + step * 16 * Tile::kScoresPitch);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        ldmatrix_x4_trans(b, keys(step, piece + n));
        mma_m16n8k16<T>(sums[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
    const int64_t group = batch_ * launch_.groups + head_ * launch_.groups_of_key_head + moving(i).group;
    const int64_t first = (group * row_tiles() * Tile::kTileRows + moving(i).first) * Tile::kHeadDim;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float(&x)[4] = sums[j];
      red_add_v4(p_.grad_q_sums + first + grad_q_place<Tile>(warp_, j, lane_), x[0], x[1], x[2], x[3]);
    }
  }

  // Computes both products of what is still with what moves, over the warp's columns. They alternate, so that more of
  // them are in flight.
  DFLASH_INLINE void multiply_rows(Products& s, Products& grad_p, uint32_t first, uint32_t second) {
    const Pieces<Tile> pieces(first, lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
    const Pieces<Tile> still(Tile::kAddsGradQ ? still_keys() : 0, row_ + lane_ % 16, lane_ / 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (Tile::kAddsGradQ) ldmatrix_x4(a_[step], still(0, step));
#pragma unroll
      for (int n = 0; n < kMovingSteps; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, pieces(n, step));
        mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(s[8 * n]), a_[step], b[0], b[1]);
        mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(s[8 * n + 4]), a_[step], b[2], b[3]);
        ldmatrix_x4(b, pieces(n, step) + (second - first));
        mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(grad_p[8 * n]), b_[step], b[0], b[1]);
        mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(grad_p[8 * n + 4]), b_[step], b[2], b[3]);
      }
    }
  }

  // sums += weights * moving, in the warp's columns.
  DFLASH_INLINE void multiply_columns(Sums& sums, const Rounded& weights, uint32_t moving) {
    const Pieces<Tile> pieces(moving, lane_ % 16, lane_ / 16);
#pragma unroll
    for (int step = 0; step < kMovingSteps; ++step) {
#pragma unroll
      for (int n = 0; n < Tile::kWarpDim / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, pieces(step, n));
        mma_m16n8k16<T>(sums[2 * n], weights[step], b[0], b[1]);
        mma_m16n8k16<T>(sums[2 * n + 1], weights[step], b[2], b[3]);
      }
    }
  }

  // Adds up the products that the warps of the same still rows have over their columns, always in the same order.
  DFLASH_INLINE void add_partials(Products& s, Products& grad_p, int column) {
    if constexpr (kParts > 1) {
      constexpr int kQuads = kWidth / 8;
      // Every column has a place of its own, which was last read before the tile arrived.
      float4* const partials = shared_.partials + column * (Tile::kThreads / 4) + lane_;
      const auto partial = [&](int warp, int i) { return partials + (warp * 2 * kQuads + i) * 32; };
      const auto each = [&](const auto& function) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          function(i, &s[4 * i]);
          function(kQuads + i, &grad_p[4 * i]);
        }
      };
      each([&](int i, float* x) { *partial(warp_, i) = make_float4(x[0], x[1], x[2], x[3]); });
      __syncthreads();
      const int first_warp = warp_ / kParts * kParts;
      each([&](int i, float* x) {
        float4 sum = *partial(first_warp, i);
#pragma unroll
        for (int part = 1; part < kParts; ++part) {
          const float4 other = *partial(first_warp + part, i);
          sum.x += other.x;
          sum.y += other.y;
          sum.z += other.z;
          sum.w += other.w;
        }
        x[0] = sum.x;
        x[1] = sum.y;
        x[2] = sum.z;
        x[3] = sum.w;
      });
    }
  }

  // Turns scores into probabilities, and the gradients of probabilities into those of the products of q and k.
  DFLASH_INLINE void differentiate(Products& s, Products& grad_p, int stage, int first_column, const Moving& moving) {
    const auto column = [&](int i) { return first_column + lane_ % 4 * 2 + accumulator_column(i); };
    const auto lse = [&](int i) { return kOfKeys ? shared_.stats[stage][column(i)] : lse_[i / 2 % 2]; };
    const auto delta = [&](int i) { return kOfKeys ? shared_.stats[stage][kMoving + column(i)] : delta_[i / 2 % 2]; };
    const Scores& scores = shared_.scores;
    scores(s);
    if (scores.outer != 0) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        const float tanh = __fdividef(s[i], scores.outer);
        grad_p[i] = (grad_p[i] - delta(i)) * (1 - tanh * tanh);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) grad_p[i] -= delta(i);
    }
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      s[i] = exp2_of(fmaf(s[i], scores.factor, -lse(i)));
      grad_p[i] *= s[i];
    }
    if (!moving.is_full) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        const int still = row_ + lane_ / 4 + i / 2 % 2 * 8;
        const RowKeys& keys = kOfKeys ? shared_.keys[stage][position_of(column(i))] : shared_.keys[0][still];
        if (!row_sees(keys, kOfKeys ? first_ + still : moving.first + column(i))) s[i] = grad_p[i] = 0;
      }
    }
  }

  // ---- the end

  DFLASH_INLINE void write() {
    const float scale = static_cast<float>(p_.scale);
    if constexpr (kOfKeys) {
      write(first_sums_, scale, p_.grad_k, p_.grad_k_strides, launch_.grad_k_aligned);
      write(second_sums_, 1, p_.grad_v, p_.grad_v_strides, launch_.grad_v_aligned);
    } else {
      write(first_sums_, scale, p_.grad_q, p_.grad_q_strides, launch_.grad_q_aligned);
    }
  }

  // Writes sums through shared memory, so that they leave as whole rows.
  DFLASH_INLINE void write(const Sums& sums, float factor, void* data, const HeadStrides& strides, bool aligned) {
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < Tile::kWarpDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(shared_.tiles + part_bytes_ + chunk_offset<Tile>(row_ + 8 * r + lane_ / 4, n) +
                                     lane_ % 4 * 4) = pack<T>(sums[n][2 * r] * factor, sums[n][2 * r + 1] * factor);
      }
    }
    __syncthreads();
    const CopyShare<Tile> share;
    const auto at = [&](int i) {
      const int row = first_ + i;
      return static_cast<uint16_t*>(data) + (kOfKeys ? key_offset(strides, row) : row_offset(strides, head_, row)) +
             share.chunk * kChunkSize;
    };
    const auto has = [&](int i) {
      return (kOfKeys ? has_key(first_ + i) : has_row(first_ + i)) && is_inside(share.chunk);
    };
    write_rows<Tile, kStill>(shared_.tiles, aligned, at, has);
  }

  const BackwardParams& p_;
  const BackwardLaunch& launch_;
  BackwardShared<Tile>& shared_;
  const uint32_t tiles_;
  const int lane_, warp_, row_, part_bytes_;
  int batch_;
  int head_;    // the key head, or the head group
  int first_;   // the first still key or row
  Fragments a_, b_;
  float lse_[2], delta_[2];  // of the thread's two still rows
  Sums first_sums_ = {}, second_sums_ = {};  // with the first and the second tensor of what moves
};

}  // namespace dflash::DFLASH_ISA::sm80
