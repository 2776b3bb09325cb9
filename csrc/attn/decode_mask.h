// The bounds that IntervalMask.decode gives to a row: a cache of its own length per batch entry, then a block.
// dflash_ext/masks.py documents the semantics.
#pragma once

#include <cstdint>

namespace dflash {

// A length for each batch entry: int32 or int64 [1 or B], or one number for all where data is null.
struct Lengths {
  const void* data;
  bool is_int64;
  int64_t stride;  // 0 where one length serves all entries
  int64_t value;

  constexpr int64_t at(int64_t entry) const {
    if (!data) return value;
    const int64_t i = entry * stride;
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

enum class BlockWindow { kNone, kBehind, kZlab, kSpeculators };

struct DecodeMaskParams {
  Lengths cache_lens, q_lens, kv_start;
  int64_t entries, block_len, kv_len;
  bool causal;
  BlockWindow kind;
  int64_t window;
  int32_t* bounds;  // [4, entries, block_len]: ctx_lo, ctx_hi, blk_lo, blk_hi
};

// No bound is larger than this, and lengths beyond it mean the same.
constexpr int64_t kFarKey = int64_t(1) << 31;

constexpr int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Writes the four bounds of row `slot` of one entry.
constexpr void set_decode_bounds(const DecodeMaskParams& p, int64_t entry, int64_t slot) {
  const int64_t cached = clamped(p.cache_lens.at(entry), -kFarKey, kFarKey);
  const int64_t start = clamped(p.kv_start.at(entry), -kFarKey, kFarKey);
  const int64_t rows = clamped(p.q_lens.at(entry), 0, p.block_len);
  int64_t behind = 0;  // how many tokens before the block the row sees
  int64_t first = 0, last = p.causal ? slot + 1 : p.block_len;  // which slots of the block
  if (p.kind == BlockWindow::kSpeculators) {
    behind = p.window;
  } else if (p.kind != BlockWindow::kNone) {
    behind = p.window - 1 - slot;
    first = slot - (p.window - 1);
    if (p.kind == BlockWindow::kZlab && last > slot + p.window) last = slot + p.window;
  }
  if (first < 0) first = 0;
  if (last > rows) last = rows;
  int64_t context = start;
  if (p.kind != BlockWindow::kNone && cached - behind > context) context = cached - behind;
  const int64_t block = cached + first > start ? cached + first : start;
  const int64_t row[4] = {context, cached, block, cached + last};
  const int64_t count = p.entries * p.block_len;
  int32_t* const out = p.bounds + entry * p.block_len + slot;
  for (int i = 0; i < 4; ++i) out[i * count] = slot < rows ? int32_t(clamped(row[i], 0, p.kv_len)) : 0;
}

const char* decode_mask_sm80(const DecodeMaskParams& params, void* stream);

}  // namespace dflash
