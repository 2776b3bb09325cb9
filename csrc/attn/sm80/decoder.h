// A block of the portable decode kernel: how it fetches key tiles, visits them, and leaves its results.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "attn/not_finite.h"
#include "attn/plan_check.h"
#include "attn/sm80/decode_combine.h"
#include "attn/sm80/decode_tiling.h"

namespace dflash::DFLASH_ISA::sm80 {

template <class T, int kDim>
struct Decoder : DecodeTiling<kDim> {
  using Tile = DecodeTiling<kDim>;
  using Shared = DecodeShared<Tile>;
  using Tile::kChunks, Tile::kColumns, Tile::kColumnWarps, Tile::kKeys, Tile::kRowBytes, Tile::kThreads, Tile::kWarps;

  const DecodeProblem& p;
  Shared& shared;
  const uint32_t queries, ring;  // shared addresses
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp / kColumnWarps * 16, first_column = warp % kColumnWarps * kColumns;

  // Of the current item: the bounds of the thread's two rows, and their sums so far.
  RowBounds bounds[2];
  OnlineSoftmax softmax;
  float o[kColumns / 8][4];

  DFLASH_INLINE Decoder(const DecodeProblem& problem, uint8_t* memory)
      : p(problem),
        shared(*reinterpret_cast<Shared*>(memory + Tile::kQueryBytes + p.stages * Tile::kStageBytes)),
        queries(shared_address(memory)),
        ring(queries + Tile::kQueryBytes) {}

  DFLASH_INLINE void clear() {
    softmax = OnlineSoftmax();
#pragma unroll
    for (auto& values : o) {
#pragma unroll
      for (float& value : values) value = 0;
    }
  }

  // Tiles begin at multiples of kRowBytes and of 8 rows. If (row r, chunk c) lies at x, then (r, c ^ i) lies at x ^
  // 16i; and if r has none of the bits of i, then (r + i, c) lies at (x ^ i % 8 * 16) + i * kRowBytes.
  static DFLASH_INLINE uint32_t place(int row, int chunk) { return chunk_offset<Tile>(row, chunk); }

  DFLASH_INLINE uint32_t keys_at(int stage) const { return ring + stage * Tile::kStageBytes; }
  DFLASH_INLINE uint32_t values_at(int stage) const { return keys_at(stage) + Tile::kKeyBytes; }

  static DFLASH_INLINE uint4 read(const T* from, bool aligned) {
    return aligned ? __ldg(reinterpret_cast<const uint4*>(from)) : read_unaligned(from);
  }

  // Returns the page of a key (-1 if there is none) or the batch entry, and the row in it.
  DFLASH_INLINE int2 locate(const Job& job, int key) const {
    if (!p.pages.table) return {job.rows.batch, key};
    const unsigned size = static_cast<unsigned>(p.pages.page_size), index = key / size;
    const int page = p.pages.table[job.rows.batch * p.pages.max_pages + index];
    return {static_cast<unsigned>(page) < p.pages.count ? page : -1, static_cast<int>(key - index * size)};
  }

  static DFLASH_INLINE const T* row_of(const void* cache, const HeadStrides& strides, int kv_head, int2 location) {
    return static_cast<const T*>(cache) + location.x * strides.batch + kv_head * strides.head +
           location.y * strides.row;
  }

  // Starts copying a tile of keys and values. Only keys of the plan's runs are read.
  DFLASH_INLINE void fetch(const Step& step, int stage) const {
    constexpr int kRows = kKeys / kWarps, kCopies = kRows * kChunks / 32, kStride = kChunks < 32 ? 32 / kChunks : 1;
    const Job& job = shared.steps.job(step);
    if (!p.kv_aligned || (p.pages.table && p.pages.page_size % kRows != 0)) return fetch_singly(job, step.key, stage);
    const int head_dim = static_cast<int>(p.head_dim);
    const int chunk = lane % kChunks, row = warp * kRows + lane / kChunks;  // of copy 0
    unsigned needed = ~0u;                                                  // a bit for every copy
    if (!step.is_inside) {
      needed = 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) needed |= job.needs(step.key + row + i * 32 / kChunks) << i;
    }
    // All rows of the warp are on one page.
    int2 location{-1, 0};
    if (__any_sync(~0u, needed)) location = locate(job, step.key + warp * kRows);
    if (location.x < 0) needed = 0;
    location.y += lane / kChunks;
    const T* k = row_of(p.k, p.k_strides, job.rows.kv_head, location) + chunk * 8;
    const T* v = row_of(p.v, p.v_strides, job.rows.kv_head, location) + chunk * 8;
    const uint32_t keys = keys_at(stage) + place(row, chunk);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      constexpr int kMore = kChunks > 32 ? 32 : 0;  // chunks to the right, in every other copy
      const int down = i * 32 / kChunks, right = i % 2 * kMore;
      const int bytes = needed >> i & (chunk + right) * 8 < head_dim ? 16 : 0;
      const uint32_t at = (keys ^ down % 8 * 16) + down * kRowBytes + right * 16;
      cp_async(at, k + right * 8, bytes);
      cp_async(at + Tile::kKeyBytes, v + right * 8, bytes);
      if (kMore == 0 || i % 2 == 1) {
        k += kStride * p.k_strides.row;
        v += kStride * p.v_strides.row;
      }
    }
  }

  // Copies a tile of caches that are not aligned, or whose pages cut a warp's rows, one chunk at a time.
  DFLASH_INLINE void fetch_singly(const Job& job, int first_key, int stage) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int key = i / kChunks, chunk = i % kChunks;
      bool exists = job.needs(first_key + key) && chunk * 8 < p.head_dim;
      const int2 location = exists ? locate(job, first_key + key) : int2{0, 0};
      exists &= location.x >= 0;
      const T* const k = row_of(p.k, p.k_strides, job.rows.kv_head, location) + chunk * 8;
      const T* const v = row_of(p.v, p.v_strides, job.rows.kv_head, location) + chunk * 8;
      const uint32_t to = keys_at(stage) + place(key, chunk);
      write_shared(to, exists ? read(k, p.kv_aligned) : uint4{});
      write_shared(to + Tile::kKeyBytes, exists ? read(v, p.kv_aligned) : uint4{});
    }
  }

  DFLASH_INLINE RowPlace own_place(int r) const { return shared.places[first_row + lane / 4 + 8 * r]; }

  // Prefetches the queries and bounds of an item before its keys are loaded. Loaded later, they would queue behind all
  // keys in flight.
  DFLASH_INLINE void prefetch_rows(const Job& job) const {
    constexpr int kLine = 64, kLines = kDecodeRows * kDim / kLine;  // elements of 128 bytes
    const ItemRows& rows = job.rows;
#pragma unroll 1
    for (int i = threadIdx.x; i < kLines; i += kThreads) {
      const int column = i % (kDim / kLine) * kLine;
      const RowPlace row = shared.places[i / (kDim / kLine)];
      if (column < p.head_dim && rows.has(row)) {
        prefetch_l2(static_cast<const T*>(p.q) + rows.offset(p.q_strides, row) + column);
      }
    }
    if (threadIdx.x < rows.positions) {
      const int64_t at = rows.batch * p.mask.batch + rows.first + threadIdx.x;
      for (const int32_t* bound : {p.mask.ctx_lo, p.mask.ctx_hi, p.mask.blk_lo, p.mask.blk_hi}) prefetch_l2(bound + at);
    }
  }

  DFLASH_INLINE void begin(const Job& job) {
    // All loads come before the first use.
    constexpr int kCount = kDecodeRows * kChunks / kThreads, kBatch = kDim <= 128 ? kCount : 4;
    int4 own_bounds[2] = {};
    const PlanCheck check(p.tile_plans()[job.item.tile]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowPlace row = own_place(r);
      if (!job.rows.has(row)) continue;
      own_bounds[r] = read_bounds(p.mask, job.rows.batch, job.rows.first + row.position);
    }
#pragma unroll 1
    for (int first = 0; first < kCount; first += kBatch) {
      uint4 values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = ((first + i) * kThreads + threadIdx.x) / kChunks, chunk = threadIdx.x % kChunks;
        const RowPlace in_tile = shared.places[row];
        values[i] = {};
        if (chunk * 8 < p.head_dim && job.rows.has(in_tile)) {
          values[i] = read(static_cast<const T*>(p.q) + job.rows.offset(p.q_strides, in_tile) + chunk * 8, p.q_aligned);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = ((first + i) * kThreads + threadIdx.x) / kChunks, chunk = threadIdx.x % kChunks;
        write_shared(queries + place(row, chunk), values[i]);
      }
    }
    clear();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bounds[r] = RowBounds(own_bounds[r], static_cast<int>(p.kv_len));
      softmax.sum[r] = check.addend(bounds[r]);
    }
  }

  DFLASH_INLINE void multiply_keys(float (&s)[kKeys / 2], int stage) const {
#pragma unroll
    for (float& score : s) score = 0;
    const uint32_t own_queries = queries + place(first_row + lane % 16, lane / 16);
    const uint32_t own_keys = keys_at(stage) + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, own_queries ^ step * 32);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, (own_keys ^ step * 32) + n * 16 * kRowBytes);
        auto* const pair = reinterpret_cast<float(*)[4]>(s + 8 * n);
        mma_m16n8k16<T>(pair[0], a, b[0], b[1]);
        mma_m16n8k16<T>(pair[1], a, b[2], b[3]);
      }
    }
  }

  DFLASH_INLINE void add_values(const float (&s)[kKeys / 2], int stage) {
    const uint32_t own_values = values_at(stage) + place(lane % 16, first_column / 8 + lane / 16);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const float* const weights = s + 8 * step;
      const uint32_t a[4] = {pack<T>(weights[0], weights[1]), pack<T>(weights[2], weights[3]),
                             pack<T>(weights[4], weights[5]), pack<T>(weights[6], weights[7])};
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, (own_values ^ n * 32) + step * 16 * kRowBytes);
        mma_m16n8k16<T>(o[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(o[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  DFLASH_INLINE void visit(const Step& step, int stage) {
    const bool has_rows = first_row < shared.steps.job(step).rows.positions * p.fold;
    float s[kKeys / 2];
    if (has_rows) {
      multiply_keys(s, stage);
      shared.scores(s);
      if (!step.is_full) hide(s, bounds, step.key);
      float correction[2];
      softmax.add(s, shared.scores.factor, correction);
      // Rescaling is skipped when no row of the warp has a new maximum, which is true of most tiles.
      if (__any_sync(~0u, correction[0] != 1 || correction[1] != 1)) {
#pragma unroll
        for (auto& values : o) {
#pragma unroll
          for (int i = 0; i < 4; ++i) values[i] *= correction[i / 2];
        }
      }
    }
    if (!step.is_full) {
      const uint32_t values = values_at(stage);
      const auto pair_at = [&](int key, int fragment) {
        return (values + place(key, first_column / 8) + lane % 4 * 4) ^ fragment * 16;
      };
      auto& out = reinterpret_cast<float(&)[kColumns / 2]>(o);
      set_aside<T, kKeys, kThreads>(values, Tile::kKeyBytes, step.key, bounds, out, 0, pair_at);
      __syncthreads();
    }
    if (has_rows) add_values(s, stage);
  }

  DFLASH_INLINE void write_out(const ItemRows& rows) {
    float inverse[2], lse[2];
    softmax.finish(shared.scores.factor, inverse, lse);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowPlace row = own_place(r);
      if (!rows.has(row)) continue;
      T* const out = static_cast<T*>(p.out) + rows.offset(p.out_strides, row) + first_column + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        if (first_column / 8 + n < p.fragments) {
          *reinterpret_cast<uint32_t*>(out + n * 8) = pack<T>(o[n][2 * r] * inverse[r], o[n][2 * r + 1] * inverse[r]);
        }
      }
    }
  }

  DFLASH_INLINE void write_part(const ItemRows& rows, int slot) const {
    const int fragments = first_row < rows.positions * p.fold ? p.fragments : 0;
    float4* const out = p.part(slot, first_row / 16, first_column / 8) + lane;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      if (first_column / 8 + n < fragments) out[n * 32] = {o[n][0], o[n][1], o[n][2], o[n][3]};
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = total_of(softmax.sum[r]);
      if (first_column == 0 && lane % 4 == 0) {
        const int row = slot * kDecodeRows + first_row + lane / 4 + 8 * r;
        p.partial_stats[row] = {softmax.largest[r] * shared.scores.factor, sum};
      }
    }
  }

  // Waits for all copies but those of the last `tiles` tiles.
  static DFLASH_INLINE void wait_for_all_but(int tiles) {
    if (tiles >= 2) return cp_async_wait_group<2>();
    if (tiles == 1) return cp_async_wait_group<1>();
    cp_async_wait_group<0>();
  }

  DFLASH_INLINE void run() {
    // The workspace may hold anything. No block may use a counter before all have set their own to zero, so every block
    // arrives at this grid barrier now. It waits for the others only when it is done with its keys.
    const auto grid = cooperative_groups::this_grid();
    if (threadIdx.x == 0) p.counters[blockIdx.x] = 0;
    auto counters_are_zero = grid.barrier_arrive();
    const WorkRange found(p);
    if (found.begin == found.end) return;
    if (threadIdx.x < kDecodeRows) shared.places[threadIdx.x] = {p, static_cast<int>(threadIdx.x)};
    auto& steps = shared.steps;
    const bool is_guide = threadIdx.x == kThreads - 1;
    if (threadIdx.x == kDecodeRows) {
      shared.range = found;
      shared.scores = Scores(p);
    }
    if (is_guide) {
      steps.start(p, found.item, found.begin, found.end);
      steps.add(p);
    }
    const WorkRange& range = shared.range;

    // The first tiles are fetched before step 0, and one more tile in every step. A ring of one stage has room only
    // after the previous step.
    const int first = 1 - p.stages;
    int i = first, stage = 0, fetch_stage = 0;
#pragma unroll 1
    for (;; ++i) {
      if (i >= 0) wait_for_all_but(p.stages - 2);
      __syncthreads();  // the tile of step i has arrived, step i - first has been added, and step i - 1 is done
      const Step &step = steps[max(i, 0)], &ahead = steps[i - first];
      if (step.unit == range.end) break;
      if (ahead.unit < range.end) {
        if (ahead.begins_job) prefetch_rows(steps.job(ahead));
        fetch(ahead, fetch_stage);
      }
      cp_async_commit_group();
      fetch_stage = fetch_stage + 1 == p.stages ? 0 : fetch_stage + 1;
      if (is_guide) steps.add(p);
      const Job& job = steps.job(step);
      const bool is_next_job = i > 0 && step.begins_job;
      if (is_next_job || i == max(first, -1)) begin(job);
      if (i < 0) continue;
      if (p.stages == 1) cp_async_wait_group<0>();
      if (is_next_job || p.stages == 1) __syncthreads();
      visit(step, stage);
      stage = stage + 1 == p.stages ? 0 : stage + 1;

      const bool leaves = step.ends_item || (step.ends_unit && step.unit + 1 == range.end);
      if (p.exact ? step.ends_unit : leaves) {
        if (!p.exact && range.holds(job.item)) {
          write_out(job.rows);
        } else {
          write_part(job.rows, p.exact ? step.unit : 2 * static_cast<int>(blockIdx.x) + range.begins(job.item));
        }
        clear();
      }
    }

    // Other blocks may have parts of this block's first and last item. Every block announces its parts before it waits
    // for those of others; all blocks get here at about the same time.
    grid.barrier_wait(std::move(counters_are_zero));
    const DecodeItem last = steps.job(steps[i - 1]).item;
    const auto for_each_item = [&](auto&& call) {
#pragma unroll 1
      for (DecodeItem item = range.item;;) {
        if (p.exact || !range.holds(item)) call(item);
        if (item.first == last.first) break;
        if (p.exact) {
          item.next(p);
        } else {
          item = last;
        }
      }
    };
    if (threadIdx.x == 0) {
      cuda::atomic_thread_fence(cuda::memory_order_release, cuda::thread_scope_device);
      for_each_item([&](const DecodeItem& item) {
        if (!range.holds(item)) Meeting(p, Parts(p, range, item)).arrive();
      });
    }
    for_each_item([&](const DecodeItem& item) { combine<T, kThreads>(p, range, item, shared.places); });
  }
};

}  // namespace dflash::DFLASH_ISA::sm80
