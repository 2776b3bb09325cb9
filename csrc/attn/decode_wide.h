// Decoding of many rows above the head dimensions of the Hopper decode kernel: the forward, with two rows for each row of
// queries. One of them sees the first half of the row's keys and the other one the rest, so that twice as many
// multiprocessors have work.
#pragma once

#include "attn/decode.h"

namespace dflash {

// Fewer rows are left to the decode kernels: they would not fill a tile of the forward.
constexpr int64_t kLeastWideRows = 64;

struct WideDecodeParams : AttentionParams {  // of the call
  int64_t mask_entries;                      // 1 or batch

  // What wide_decode_split makes for the forward.
  void* both_q;         // [B, Hq, 2 * Lq, D]: every row of a head, and all of them again
  void *keys, *values;  // [B, Hkv, kv_len, D]; a key that no row of its entry sees may hold anything, its value is zero
  int32_t* bounds;      // [4, mask_entries, 2 * Lq], in the order of Intervals

  // What the forward gives, and wide_decode_join adds up.
  const void* both_out;  // [B, Hq, 2 * Lq, D]
  const float* lse;      // [B, Hq, 2 * Lq]
  void* out;
  HeadStrides out_strides;
};

const char* wide_decode_split(const WideDecodeParams& params, void* stream);
const char* wide_decode_join(const WideDecodeParams& params, void* stream);

}  // namespace dflash
