// The state of the decode engine's rows, and how a cycle reads and advances it. The functions below are those of the
// CPU and of the GPU alike: `lanes` threads share a row, of which this is number `lane`. And the ring of what waits
// until a drafter reads it.
// dflash_ext/ops/cycle.py documents the semantics.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DFLASH_HOST_DEVICE __host__ __device__
#else
#define DFLASH_HOST_DEVICE
#endif

namespace dflash {

// The columns of the state, one row a slot, and the rows of what `begin` reads of it.
enum Field : int64_t { kStart, kAnchor, kLast, kActive, kSeed, kFields };
enum Reading : int64_t { kRoom = kFields, kQueryLength, kReadings };

struct BeginCycleParams {
  int64_t rows, width, block;    // the rows of the batch, the drafted tokens of each, the slots of a drafted block
  int64_t state_rows;
  const int64_t *state, *slots;  // [state_rows, kFields], [rows]
  int64_t* readings;             // [kReadings, rows]
  int32_t* slots32;              // [rows]
  int64_t* positions;            // [rows, width + 1], -1 for rows of the target that do not exist
  int64_t *block_positions, *block_places;  // [rows, block]
};

struct EndCycleParams {
  int64_t rows, width, stop_count;
  int64_t state_rows, vocabulary;
  int64_t* state;                             // [state_rows, kFields]
  const int64_t *slots, *stops, *readings;    // [rows], [state_rows, stop_count], [kReadings, rows]
  const int64_t *drafted, *accepted, *next;   // [rows, width], [rows], [rows]
  const void* logits;                         // [rows, width + 1, vocabulary], of `logit_bytes` each
  int64_t logit_bytes;
  uint64_t exponent;                          // the exponent bits of a logit; all of them are set in inf and NaN
  int64_t* records;                           // [rows, 4 + width]
  int64_t* kept;                              // [rows, width + 1]: the positions of committed tokens, or -1
};

// What belongs to the last tokens of every slot. That of position p is in place p % size.
struct RingParams {
  int64_t rows, tokens, bytes, size;  // rows of the batch, tokens of each, bytes of a token, places of a slot
  const int32_t* slots;               // [rows]
  const int64_t *start, *counts;      // [rows], when the ring is read
  int64_t* positions;                 // [rows, tokens], -1 for no token; given when the ring is written
  char *ring, *values;                // [slots, size, bytes], [rows, tokens, bytes]
};

// The position of column `column` of a row when the ring is read: `counts` tokens end before `start`. It is -1 if there
// is no such token, or if a later one has its place.
DFLASH_HOST_DEVICE inline int64_t waiting_position(const RingParams& p, int64_t row, int64_t column) {
  const int64_t start = p.start[row], position = start - p.counts[row] + column;
  return position >= 0 && position < start && position >= start - p.size ? position : -1;
}

// Where a token is in the ring.
DFLASH_HOST_DEVICE inline char* place_in_ring(const RingParams& p, int64_t row, int64_t position) {
  return p.ring + (p.slots[row] * p.size + position % p.size) * p.bytes;
}

DFLASH_HOST_DEVICE inline void begin_cycle_row(const BeginCycleParams& p, int64_t row, int lane, int lanes) {
  const int64_t* state = p.state + p.slots[row] * kFields;
  const int64_t start = state[kStart], left = state[kLast] - start;
  const bool active = state[kActive] != 0;
  const int64_t room = !active || left < 0 ? 0 : left < p.width ? left : p.width;
  if (lane == 0) {
    for (int64_t field = 0; field < kFields; ++field) p.readings[field * p.rows + row] = state[field];
    p.readings[kRoom * p.rows + row] = room;
    p.readings[kQueryLength * p.rows + row] = active ? room + 1 : 0;
    p.slots32[row] = static_cast<int32_t>(p.slots[row]);
  }
  for (int64_t i = lane; i <= p.width; i += lanes) {
    p.positions[row * (p.width + 1) + i] = active && i <= room ? start + i : -1;
  }
  for (int64_t i = lane; i < p.block; i += lanes) {
    p.block_positions[row * p.block + i] = start + i;
    p.block_places[row * p.block + i] = active ? start + i : -1;
  }
}

// Whether the lane's share of the committed tokens has one that ends the row.
DFLASH_HOST_DEVICE inline bool finds_stop(const EndCycleParams& p, int64_t row, int lane, int lanes) {
  const int64_t* stops = p.stops + p.slots[row] * p.stop_count;
  const int64_t accepted = p.accepted[row];
  const int64_t last = accepted < p.width ? accepted : p.width;
  bool found = false;
  for (int64_t i = lane; i <= last; i += lanes) {
    const int64_t token = i == accepted ? p.next[row] : p.drafted[row * p.width + i];
    for (int64_t s = 0; s < p.stop_count; ++s) found |= stops[s] == token;
  }
  return found;
}

// Whether the logit by which the row's next token was chosen is a finite number.
DFLASH_HOST_DEVICE inline bool is_finite(const EndCycleParams& p, int64_t row) {
  const int64_t at = (row * (p.width + 1) + p.accepted[row]) * p.vocabulary + p.next[row];
  const uint64_t bits = p.logit_bytes == 2   ? static_cast<const uint16_t*>(p.logits)[at]
                        : p.logit_bytes == 4 ? static_cast<const uint32_t*>(p.logits)[at]
                                             : static_cast<const uint64_t*>(p.logits)[at];
  return (bits & p.exponent) != p.exponent;
}

DFLASH_HOST_DEVICE inline void end_cycle_row(const EndCycleParams& p, int64_t row, bool stopped, int lane, int lanes) {
  const auto reading = [&](int64_t which) { return p.readings[which * p.rows + row]; };
  const bool active = reading(kActive) != 0;
  const int64_t start = reading(kStart), accepted = p.accepted[row];
  if (lane == 0) {
    int64_t* record = p.records + row * (4 + p.width);
    record[0] = active;
    record[1] = reading(kRoom);
    record[2] = accepted;
    const bool finite = is_finite(p, row);
    record[3] = finite ? p.next[row] : -1;
    if (active) {
      int64_t* state = p.state + p.slots[row] * kFields;
      state[kStart] = start + accepted + 1;
      state[kAnchor] = p.next[row];
      state[kActive] = finite && !stopped && start + accepted + 1 <= reading(kLast);
    }
  }
  for (int64_t i = lane; i < p.width; i += lanes) p.records[row * (4 + p.width) + 4 + i] = p.drafted[row * p.width + i];
  for (int64_t i = lane; i <= p.width; i += lanes) {
    p.kept[row * (p.width + 1) + i] = active && i <= accepted ? start + i : -1;
  }
}

const char* begin_cycle_sm80(const BeginCycleParams& params, void* stream);
const char* end_cycle_sm80(const EndCycleParams& params, void* stream);
const char* write_ring_sm80(const RingParams& params, void* stream);
const char* read_ring_sm80(const RingParams& params, void* stream);
const char* mark_time_sm80(int64_t* nanoseconds, void* stream);

}  // namespace dflash
