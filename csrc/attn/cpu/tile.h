// One item: a tile of rows of one key head, and the tiles of keys that they see.
#pragma once

#include <initializer_list>

#include "attn/cpu/rows.h"

namespace dflash::DFLASH_ISA {

// Allocates pieces of a thread's scratch memory. Each begins with a cache line.
struct Scratch {
  char* at;

  template <class Element>
  DFLASH_MEMBER Element* take(int64_t count) {
    Element* piece = reinterpret_cast<Element*>(at);
    at += (count * sizeof(Element) + 63) / 64 * 64;
    return piece;
  }
};

template <class T>
DFLASH_INLINE auto row_of(T* base, const HeadStrides& strides, int64_t b, int64_t head, int64_t i) {
  return base + b * strides.batch + head * strides.head + i * strides.row;
}

template <class Real, class T>
DFLASH_INLINE void copy_row(Real* to, const T* from, int64_t dim) {
  using X = Vector<Real, 8>;
  for (int64_t d = 0; d < dim; d += 8) store(to + d, load<X>(from + d));
}

template <class Block>
struct RowTile {
  static constexpr int kWidth = Block::kWidth, kPanels = kRowTile / kWidth;

  int64_t b, kv_head, group;
  int64_t first, count;                // rows
  int64_t first_position, positions;
  Visible visible[kRowTile];           // by position
  Range keys;                          // holds all keys that some row sees
  Panel<Block> panels[kPanels];

  // `within` are the keys that count.
  RowTile(const AttentionParams& p, int64_t b, int64_t kv_head, int64_t first, Range within)
      : b(b), kv_head(kv_head), group(group_of(p)), first(first) {
    const int64_t rows = rows_of(p);
    count = rows - first < kRowTile ? rows - first : kRowTile;
    first_position = first / group;
    positions = (first + count - 1) / group + 1 - first_position;
    for (int64_t i = 0; i < positions; ++i) {
      visible[i] = visible_at(p.mask, b, first_position + i, within);
      keys = keys.unite(visible[i].context).unite(visible[i].block);
    }
    for (int64_t row = 0; row < panel_count() * kWidth; ++row) panels[row / kWidth].set(row % kWidth, sight(row));
  }

  DFLASH_MEMBER int64_t panel_count() const { return (count + kWidth - 1) / kWidth; }

  // Lanes after the last row repeat it.
  DFLASH_MEMBER int64_t clamped(int64_t row) const { return first + (row < count ? row : count - 1); }
  DFLASH_MEMBER int64_t position(int64_t row) const { return clamped(row) / group; }
  DFLASH_MEMBER int64_t head(int64_t row) const { return kv_head * group + clamped(row) % group; }
  DFLASH_MEMBER const Visible& sight(int64_t row) const { return visible[position(row) - first_position]; }

  // Calls f(panel, the part of the tile that the panel visits).
  template <class F>
  DFLASH_MEMBER void each_panel(Range tile, F&& f) const {
    for (int64_t i = 0; i < panel_count(); ++i) {
      const Range part = panels[i].part_of(tile);
      if (!part.empty()) f(i, part);
    }
  }

  // Sets seen[j] to whether some row sees key tile.begin + j. Returns how many keys are seen.
  DFLASH_MEMBER int find_seen(Range tile, bool* seen) const {
    for (int64_t i = 0; i < panel_count(); ++i) {
      if (!panels[i].all_see(tile)) continue;
      __builtin_memset(seen, true, kKeyTile);
      return kKeyTile;
    }
    int32_t edges[kKeyTile + 1] = {};
    for (int64_t i = 0; i < positions; ++i) {
      for (const Range part : {visible[i].context.intersect(tile), visible[i].block.intersect(tile)}) {
        if (part.empty()) continue;
        ++edges[part.begin - tile.begin];
        --edges[part.end - tile.begin];
      }
    }
    int total = 0;
    for (int64_t j = 0, depth = 0; j < kKeyTile; ++j) {
      depth += edges[j];
      seen[j] = depth > 0;
      total += seen[j];
    }
    return total;
  }
};

// Keys and values of a tile as consecutive rows of Real.
template <class T, class Real>
struct KeyTile {
  const AttentionParams& p;
  Real *k_copy, *v_copy;
  const Real *k, *v;  // [kKeyTile, head_dim]

  KeyTile(const AttentionParams& p, Scratch& scratch)
      : p(p),
        k_copy(scratch.take<Real>(kKeyTile * p.head_dim)),
        v_copy(scratch.take<Real>(kKeyTile * p.head_dim)) {}

  // Returns false and loads nothing if no row sees any of the keys. Keys that are all seen and already lie in memory in
  // this form are not copied. In a copy, keys that no row sees are zeros, whatever their memory holds.
  template <class Rows>
  DFLASH_MEMBER bool load(const Rows& rows, Range tile) {
    bool seen[kKeyTile];
    const int total = rows.find_seen(tile, seen);
    if (total == 0) return false;
    if constexpr (__is_same(T, Real)) {
      if (total == kKeyTile && !p.pages.table && p.k_strides.row == p.head_dim && p.v_strides.row == p.head_dim) {
        k = key_row(rows, {rows.b, tile.begin});
        v = value_row(rows, {rows.b, tile.begin});
        return true;
      }
    }
    for (int64_t j = 0; j < kKeyTile; ++j) {
      Real *const to_k = k_copy + j * p.head_dim, *const to_v = v_copy + j * p.head_dim;
      const Place place = seen[j] ? place_of(rows.b, tile.begin + j) : Place{-1, 0};
      if (place.outer < 0) {
        __builtin_memset(to_k, 0, p.head_dim * sizeof(Real));
        __builtin_memset(to_v, 0, p.head_dim * sizeof(Real));
      } else {
        copy_row(to_k, key_row(rows, place), p.head_dim);
        copy_row(to_v, value_row(rows, place), p.head_dim);
      }
    }
    k = k_copy;
    v = v_copy;
    return true;
  }

 private:
  // Returns the batch entry or page that holds a key (-1 if there is no such page), and the row in it.
  struct Place {
    int64_t outer, row;
  };
  DFLASH_MEMBER Place place_of(int64_t b, int64_t key) const {
    const Pages& pages = p.pages;
    if (!pages.table) return {b, key};
    const int64_t page = pages.table[b * pages.max_pages + key / pages.page_size];
    if (0 <= page && page < pages.count) return {page, key % pages.page_size};
    __atomic_store_n(pages.missing, true, __ATOMIC_RELAXED);
    return {-1, 0};
  }
  template <class Rows>
  DFLASH_MEMBER const T* key_row(const Rows& rows, Place place) const {
    return row_of(static_cast<const T*>(p.k), p.k_strides, place.outer, rows.kv_head, place.row);
  }
  template <class Rows>
  DFLASH_MEMBER const T* value_row(const Rows& rows, Place place) const {
    return row_of(static_cast<const T*>(p.v), p.v_strides, place.outer, rows.kv_head, place.row);
  }
};

// Threads take the items in descending order, because under causal masks the last items see the most keys.
template <class F>
DFLASH_INLINE void take_items(const AttentionParams& p, int64_t count, F&& f) {
  for (;;) {
    const int64_t taken = __atomic_fetch_add(p.taken, 1, __ATOMIC_RELAXED);
    if (taken >= count) return;
    f(count - 1 - taken);
  }
}

}  // namespace dflash::DFLASH_ISA
