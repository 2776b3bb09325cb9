// block_attn's backward on any GPU since Ampere, with mma.sync, ldmatrix and cp.async.
//
// Two passes of one form, so that every sum has one owner and a fixed order. In the first a block holds keys and values
// still while the rows that see them move past: it sums dK and dV. In the second it holds queries and the outputs'
// gradients while keys and values move past: it sums dQ. What is held still lies in registers, 16 rows a warp; what
// moves arrives in two stages of shared memory. Either way a warp makes scores of 16 still rows with all that moves,
// which rounded are the first operand of the products that follow.
#include <algorithm>
#include <type_traits>

#include "attn/backward.h"
#include "attn/kernels.h"
#include "attn/sm80/key_tiles.h"
#include "attn/sm80/row_chunks.h"
#include "attn/softmax.h"
#include "common/launch.h"

namespace dflash {
namespace device {
namespace {

template <int kHeadDim_, bool kOfKeys_>
struct Tiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kOfKeys = kOfKeys_;  // keys are held still
  static constexpr int kThreads = 256;

  // A head dimension above 128 is shared by warps: each sums the scores over its own columns, and makes its own columns
  // of the gradients.
  static constexpr int kWarpDim = std::min(kHeadDim, 128);
  static constexpr int kParts = kHeadDim / kWarpDim;
  static constexpr int kStill = 16 * (kThreads / 32 / kParts);
  static constexpr int kTileRows = static_cast<int>(backward_tile_rows(kHeadDim));
  static constexpr int kMoving = kOfKeys ? kTileRows : kHeadDim <= 128 ? 64 : kHeadDim == 256 ? 32 : 16;
  static constexpr int kWidth = kHeadDim == 64 || !kOfKeys ? std::min(kMoving, 32) : 16;  // so many at a time

  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kMovingBytes = kMoving * kRowBytes;  // of one of the two tensors
  static constexpr int kTileBytes = std::max(4 * kMovingBytes, kStill * kRowBytes);
};

// What the host works out for the kernel.
struct Launch {
  int fold_bits;
  bool q_aligned, k_aligned, v_aligned, grad_out_aligned, grad_q_aligned, grad_k_aligned, grad_v_aligned;
};

DFLASH_INLINE bool sees(const RowKeys& row, int key) {
  return static_cast<unsigned>(key - row.ctx_lo) < row.ctx_len || static_cast<unsigned>(key - row.blk_lo) < row.blk_len;
}

// A tile of what moves.
struct Moving {
  int first;      // its first key, or its first row in the rows of a head group
  int group;      // of rows: the head group, counted from the key head's first
  bool is_full;    // all rows see all keys
  bool has_empty;  // some row sees nothing
  bool exists;
};

// The tiles of rows that see some of the keys [lo, hi), head group by head group. All lanes of a warp walk together.
class RowTiles {
 public:
  DFLASH_INLINE RowTiles(const RowTile* tiles, int count, int groups, int lo, int hi)
      : tiles_(tiles), count_(count), groups_(groups), lo_(lo), hi_(hi) {}

  template <int kTileRows>
  DFLASH_INLINE Moving next() {
    while (seen_ == 0) {
      if (base_ >= count_) {
        base_ = 0;
        ++group_;
      }
      if (group_ >= groups_ || count_ == 0) return {};
      const int index = base_ + static_cast<int>(threadIdx.x % 32);
      bool is_seen = false, is_full = false, has_empty = false;
      if (index < count_) {
        const RowTile tile = tiles_[index];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          is_seen |= (tile.lo[i] < hi_) & (tile.hi[i] > lo_);
          is_full |= (tile.full_lo[i] <= lo_) & (tile.full_hi[i] >= hi_);
        }
        has_empty = tile.has_empty;
      }
      seen_ = __ballot_sync(~0u, is_seen);
      full_ = __ballot_sync(~0u, is_full);
      empty_ = __ballot_sync(~0u, has_empty);
      base_ += 32;
    }
    const int bit = __ffs(seen_) - 1;
    seen_ &= seen_ - 1;
    return {(base_ - 32 + bit) * kTileRows, group_, (full_ >> bit & 1) != 0, (empty_ >> bit & 1) != 0, true};
  }

 private:
  const RowTile* tiles_;
  int count_, groups_, lo_, hi_;
  int base_ = 0, group_ = 0;
  uint32_t seen_ = 0, full_ = 0, empty_ = 0;
};

// What a run of row tiles sees, as a plan of the forward.
DFLASH_INLINE TilePlan merged(const RowTile* tiles, int count) {
  TilePlan plan{};
  for (int i = 0; i < 2; ++i) {
    int lo = 0, hi = 0, full_lo = tiles[0].full_lo[i], full_hi = tiles[0].full_hi[i];
    for (int tile = 0; tile < count; ++tile) {
      const RowTile& t = tiles[tile];
      if (t.lo[i] < t.hi[i]) {
        lo = hi == 0 ? t.lo[i] : min(lo, t.lo[i]);
        hi = max(hi, t.hi[i]);
      }
      full_lo = max(full_lo, t.full_lo[i]);
      full_hi = min(full_hi, t.full_hi[i]);
    }
    plan.lo[i] = lo;
    plan.hi[i] = hi;
    plan.full_lo[i] = full_lo;
    plan.full_hi[i] = full_hi;
  }
  if (plan.lo[1] < plan.hi[1] && (plan.lo[0] >= plan.hi[0] || plan.lo[1] < plan.lo[0])) {
    const auto swap = [](int32_t(&x)[2]) {
      const int32_t first = x[0];
      x[0] = x[1];
      x[1] = first;
    };
    swap(plan.lo);
    swap(plan.hi);
    swap(plan.full_lo);
    swap(plan.full_hi);
  }
  return plan;
}

// The key tiles that a run of row tiles visits.
template <int kKeys>
class KeyTilesOfRows {
 public:
  DFLASH_INLINE KeyTilesOfRows(const RowTile* tiles, int count)
      : plan_(merged(tiles, count)), tiles_(plan_) {}

  template <int kTileRows>
  DFLASH_INLINE Moving next() {
    if (i_ >= tiles_.count()) return {};
    const int first = tiles_[i_++];
    return {first, 0, tiles_.is_full(first), false, true};
  }

  // Some row may see the key.
  DFLASH_INLINE bool has(int key) const {
    return (key >= plan_.lo[0] && key < plan_.hi[0]) || (key >= plan_.lo[1] && key < plan_.hi[1]);
  }

 private:
  TilePlan plan_;
  KeyTiles<kKeys> tiles_;
  int i_ = 0;
};

template <class Tile>
using Walk = std::conditional_t<Tile::kOfKeys, RowTiles, KeyTilesOfRows<Tile::kMoving>>;

// Registers are what the kernel is short of: whatever need not be at hand lies here.
template <class Tile>
struct Shared {
  alignas(128) uint8_t tiles[Tile::kTileBytes];  // two stages of what moves; at the ends what is held still
  Scores scores;
  Walk<Tile> walk;
  Moving moving[3];  // the tile at hand, the one on its way, the one after it
  // Of the rows that move, or the rows that are held still.
  alignas(16) float stats[2][2 * (Tile::kOfKeys ? Tile::kMoving : 0)];  // LSEs, then deltas
  RowKeys keys[Tile::kOfKeys ? 2 : 1][Tile::kOfKeys ? Tile::kMoving : Tile::kStill];
  float4 partials[Tile::kParts == 1 ? 0 : Tile::kThreads * Tile::kMoving / 4];  // scores over a part of the columns
};

// The state of a thread while its block works.
template <class T, class Tile>
class Pass {
  static constexpr bool kOfKeys = Tile::kOfKeys;
  static constexpr int kMoving = Tile::kMoving, kWidth = Tile::kWidth, kStill = Tile::kStill, kParts = Tile::kParts;
  static constexpr int kSteps = Tile::kWarpDim / 16, kMovingSteps = kWidth / 16;
  using Products = float[kWidth / 2];         // of 16 still rows with what moves, laid out as softmax.h says
  using Rounded = uint32_t[kMovingSteps][4];  // two neighbours in one
  using Fragments = uint32_t[kSteps][4];      // of 16 still rows
  using Sums = float[Tile::kWarpDim / 8][4];

 public:
  DFLASH_INLINE Pass(const BackwardParams& p, const Launch& launch, Shared<Tile>& shared)
      : p_(p),
        launch_(launch),
        shared_(shared),
        tiles_(shared_address(shared.tiles)),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        row_(warp_ / kParts * 16),
        part_bytes_(warp_ % kParts * Tile::kWarpDim * 2) {
    const unsigned heads = kOfKeys ? p.kv_heads : p.heads >> launch.fold_bits;
    const unsigned tile = blockIdx.x / heads / static_cast<unsigned>(p.batch);
    const unsigned count = gridDim.x / heads / static_cast<unsigned>(p.batch);
    batch_ = blockIdx.x / heads % static_cast<unsigned>(p.batch);
    head_ = blockIdx.x % heads;
    // Under causal masks the first keys have the most rows, and the last rows the most keys: these go first.
    first_ = static_cast<int>(kOfKeys ? tile : count - 1 - tile) * kStill;
    groups_ = static_cast<int>(p.heads / p.kv_heads) >> launch.fold_bits;
    row_tiles_ = static_cast<int>(p.row_tiles);
  }

  DFLASH_INLINE void run() {
    if (threadIdx.x == 0) {
      shared_.scores = Scores(p_);
      shared_.walk = make_walk();
    }
    load_still(first_source(), first_aligned(), a_);
    load_still(second_source(), second_aligned(), b_);
    if constexpr (!kOfKeys) load_row_facts();
    find_next(0);
    find_next(1);
    __syncthreads();
    if (shared_.moving[0].exists) copy(0, shared_.moving[0]);
    for (int i = 0, stage = 0; shared_.moving[i].exists; i = next_of(i), stage ^= 1) {
      cp_async_wait_group<0>();
      __syncthreads();  // the stage has arrived, and the other has been used
      const Moving& next = shared_.moving[next_of(i)];
      if (next.exists) copy(stage ^ 1, next);
      find_next(next_of(next_of(i)));
      const Moving& moving = shared_.moving[i];
      if (kOfKeys && moving.has_empty) clear_empty_rows(stage);
#pragma unroll 1
      for (int column = 0; column < kMoving; column += kWidth) take_in(stage, column, moving);
    }
    write();
  }

 private:
  DFLASH_INLINE bool is_inside(int chunk) const { return chunk * kChunkSize < static_cast<int>(p_.head_dim); }

  // ---- where things lie

  // A row of a head group, head by head within a position.
  DFLASH_INLINE int64_t entry() const { return p_.entries == 1 ? 0 : batch_; }
  DFLASH_INLINE int position_of(int row) const { return row >> launch_.fold_bits; }
  DFLASH_INLINE int64_t row_offset(const HeadStrides& strides, int group, int row) const {
    const int head = (group << launch_.fold_bits) + (row & ((1 << launch_.fold_bits) - 1));
    return batch_ * strides.batch + head * strides.head + position_of(row) * strides.row;
  }
  DFLASH_INLINE int64_t key_offset(const HeadStrides& strides, int key) const {
    return batch_ * strides.batch + key_head() * strides.head + key * strides.row;
  }
  DFLASH_INLINE int key_head() const { return kOfKeys ? head_ : head_ / groups_; }
  DFLASH_INLINE bool has_row(int row) const { return position_of(row) < static_cast<int>(p_.q_len); }
  DFLASH_INLINE bool has_key(int key) const { return key < static_cast<int>(p_.kv_len); }
  // Of the tile that row `first` of the group begins.
  DFLASH_INLINE const float* stats_of(int group, int first) const {
    return p_.stats + (batch_ * (p_.heads >> launch_.fold_bits) + group) * (int64_t(row_tiles_) * 2 * Tile::kTileRows) +
           2 * first;
  }
  DFLASH_INLINE const RowKeys* keys_of_rows() const {
    return p_.keys + entry() * row_tiles_ * (Tile::kTileRows >> launch_.fold_bits);
  }

  // ---- what is held still: keys and values, or queries and the outputs' gradients

  DFLASH_INLINE const void* first_source() const { return kOfKeys ? p_.k : p_.q; }
  DFLASH_INLINE const void* second_source() const { return kOfKeys ? p_.v : p_.grad_out; }
  DFLASH_INLINE bool first_aligned() const { return kOfKeys ? launch_.k_aligned : launch_.q_aligned; }
  DFLASH_INLINE bool second_aligned() const { return kOfKeys ? launch_.v_aligned : launch_.grad_out_aligned; }

  DFLASH_INLINE void load_still(const void* source, bool aligned, Fragments& fragments) {
    const CopyShare<Tile> share;
    const HeadStrides& strides = source == first_source() ? (kOfKeys ? p_.k_strides : p_.q_strides)
                                                          : (kOfKeys ? p_.v_strides : p_.grad_out_strides);
    const auto at = [&](int i) {
      const int row = first_ + share.row + i;
      return static_cast<const uint16_t*>(source) + (kOfKeys ? key_offset(strides, row) : row_offset(strides, head_, row)) +
             share.chunk * kChunkSize;
    };
    const auto has = [&](int i) {
      const int row = first_ + share.row + i;
      return (kOfKeys ? has_key(row) : has_row(row)) && is_inside(share.chunk);
    };
    copy_rows<Tile, kStill>(tiles_, aligned, at, has);
    cp_async_wait_group<0>();
    __syncthreads();
    const Pieces<Tile> pieces(tiles_ + part_bytes_, row_ + lane_ % 16, lane_ / 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ldmatrix_x4(fragments[step], pieces(0, step));
    __syncthreads();
  }

  // Of the thread's two rows that are held still.
  DFLASH_INLINE void load_row_facts() {
    const int rows = row_tiles_ * Tile::kTileRows;
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

  static DFLASH_INLINE int next_of(int i) { return i == 2 ? 0 : i + 1; }

  // The first warp walks.
  DFLASH_INLINE void find_next(int slot) {
    if (warp_ != 0) return;
    Walk<Tile> walk = shared_.walk;
    const Moving moving = walk.template next<Tile::kTileRows>();
    __syncwarp();
    if (lane_ == 0) {
      shared_.walk = walk;
      shared_.moving[slot] = moving;
    }
    __syncwarp();
  }

  DFLASH_INLINE Walk<Tile> make_walk() const {
    const RowTile* const tiles = p_.tiles + entry() * row_tiles_;
    if constexpr (kOfKeys) {
      return RowTiles(tiles, row_tiles_, groups_, first_, min(first_ + kStill, static_cast<int>(p_.kv_len)));
    } else {
      const int tile = first_ / Tile::kTileRows;
      return Walk<Tile>(tiles + tile, min(kStill / Tile::kTileRows, row_tiles_ - tile));
    }
  }

  DFLASH_INLINE void copy(int stage, const Moving& moving) {
    const uint32_t to = tiles_ + stage * 2 * Tile::kMovingBytes;
    if constexpr (kOfKeys) {
      const int group = head_ * groups_ + moving.group;
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
        const auto has = [&](int i) { return shared_.walk.has(moving.first + share.row + i) && is_inside(share.chunk); };
        copy_rows<Tile, kMoving>(to, aligned, at, has);
      };
      copy_tensor(to, p_.k, p_.k_strides, launch_.k_aligned);
      copy_tensor(to + Tile::kMovingBytes, p_.v, p_.v_strides, launch_.v_aligned);
    }
  }

  // Rows that see nothing become zeros: a NaN in them would reach keys through a product with zero.
  DFLASH_INLINE void clear_empty_rows(int stage) {
    const CopyShare<Tile> share;
    for (int row = share.row; row < kMoving; row += share.kStep) {
      if (shared_.stats[stage][row] != kInfinity) continue;
      const uint32_t zeros[4] = {};
      for (int tensor = 0; tensor < 2; ++tensor) {
        store_shared(tiles_ + (stage * 2 + tensor) * Tile::kMovingBytes + chunk_offset<Tile>(row, share.chunk), zeros);
      }
    }
    __syncthreads();
  }

  // ---- products

  // Takes in kWidth of what moves, from `column` on.
  DFLASH_INLINE void take_in(int stage, int column, const Moving& moving) {
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
  }

  // The products of what is held still with what moves, over the warp's columns: both at once, so that more of them are
  // under way.
  DFLASH_INLINE void multiply_rows(Products& s, Products& grad_p, uint32_t first, uint32_t second) {
    const Pieces<Tile> pieces(first, lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
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

  // sums += weights moving, the warp's columns.
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

  // Adds what the other warps of the same still rows have of their columns, in one order.
  DFLASH_INLINE void add_partials(Products& s, Products& grad_p, int column) {
    if constexpr (kParts > 1) {
      constexpr int kQuads = kWidth / 8;
      // Every column has a place of its own: what was there has been used since the tile arrived.
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

  // Scores become probabilities, and the gradients of these those of the products of q and k.
  DFLASH_INLINE void differentiate(Products& s, Products& grad_p, int stage, int first_column, const Moving& moving) {
    const auto column = [&](int i) { return first_column + i / 4 * 8 + lane_ % 4 * 2 + i % 2; };
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
        if (!sees(keys, kOfKeys ? first_ + still : moving.first + column(i))) s[i] = grad_p[i] = 0;
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

  // Sums go through shared memory, to be written as whole rows.
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
    for (int i = share.row; i < kStill; i += share.kStep) {
      const int row = first_ + i;
      if (!(kOfKeys ? has_key(row) : has_row(row)) || !is_inside(share.chunk)) continue;
      const auto chunk = *reinterpret_cast<const Chunk<uint16_t>*>(shared_.tiles + chunk_offset<Tile>(i, share.chunk));
      auto* to = static_cast<uint16_t*>(data) + (kOfKeys ? key_offset(strides, row) : row_offset(strides, head_, row)) +
                 share.chunk * kChunkSize;
      if (aligned) {
        *reinterpret_cast<Chunk<uint16_t>*>(to) = chunk;
      } else {
#pragma unroll
        for (int k = 0; k < kChunkSize; ++k) to[k] = chunk.values[k];
      }
    }
  }

  const BackwardParams& p_;
  const Launch& launch_;
  Shared<Tile>& shared_;
  const uint32_t tiles_;
  const int lane_, warp_, row_, part_bytes_;
  int batch_;
  int head_;    // the key head, or the head group
  int first_;   // the first key or row that is held still
  int groups_;  // head groups of a key head
  int row_tiles_;
  Fragments a_, b_;
  float lse_[2], delta_[2];  // of the thread's two rows that are held still
  Sums first_sums_ = {}, second_sums_ = {};  // with the first and the second tensor of what moves
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_attn_backward_keys_sm80(const __grid_constant__ BackwardParams p, const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  Pass<T, Tile>(p, launch, *reinterpret_cast<Shared<Tile>*>(shared_memory)).run();
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_attn_backward_queries_sm80(const __grid_constant__ BackwardParams p, const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  Pass<T, Tile>(p, launch, *reinterpret_cast<Shared<Tile>*>(shared_memory)).run();
}

template <class T, class Tile>
cudaError_t run_pass(const BackwardParams& p, const Launch& launch, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Shared<Tile>);
  static_assert(kSharedBytes <= 99 * 1024, "more than compute capability 8.6 and 8.9 give a block");
  const int64_t length = Tile::kOfKeys ? p.kv_len : p.q_len * p.fold;
  const int64_t blocks = (length + Tile::kStill - 1) / Tile::kStill * (Tile::kOfKeys ? p.kv_heads : p.heads / p.fold) * p.batch;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = [] {
    if constexpr (Tile::kOfKeys) {
      return block_attn_backward_keys_sm80<T, Tile>;
    } else {
      return block_attn_backward_queries_sm80<T, Tile>;
    }
  }();
  return launch_kernel(kernel, {blocks, Tile::kThreads, kSharedBytes}, stream, p, launch);
}

template <class T, int kDim>
cudaError_t launch(const BackwardParams& p, cudaStream_t stream) {
  const Launch launch{__builtin_ctzll(p.fold),
                      in_chunks(p.q, p.q_strides),
                      in_chunks(p.k, p.k_strides),
                      in_chunks(p.v, p.v_strides),
                      in_chunks(p.grad_out, p.grad_out_strides),
                      in_chunks(p.grad_q, p.grad_q_strides),
                      in_chunks(p.grad_k, p.grad_k_strides),
                      in_chunks(p.grad_v, p.grad_v_strides)};
  const cudaError_t status = run_pass<T, Tiling<kDim, true>>(p, launch, stream);
  return status == cudaSuccess ? run_pass<T, Tiling<kDim, false>>(p, launch, stream) : status;
}

}  // namespace
}  // namespace device

const char* backward_sm80(const BackwardParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return checked_launch([&] {
    return with_dim(params.head_dim, [&]<int kDim> {
      return params.dtype == DType::kBFloat16 ? device::launch<__nv_bfloat16, kDim>(params, cuda_stream)
                                              : device::launch<__half, kDim>(params, cuda_stream);
    });
  });
}

}  // namespace dflash
