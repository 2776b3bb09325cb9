// Operators of the cycle family. dflash_ext/ops/cycle.py documents the semantics.
#include "cycle/params.h"

#include <cstring>
#include <tuple>

#include "common/tensor.h"

namespace dflash {
namespace {

int64_t* numbers(Tensor& tensor) { return static_cast<int64_t*>(tensor.data_ptr()); }

// Checks the slots, numbers of type Slot, of a table that has one row a slot.
template <class Slot>
const Slot* checked_slots(const char* op, const char* name, const Tensor& table, const Tensor& slots) {
  check_tensor(op, "slots", slots, table, sizeof(Slot) == 8 ? ScalarType::Long : ScalarType::Int, {slots.size(0)});
  const Slot* all = static_cast<const Slot*>(slots.data_ptr());
  for (int64_t row = 0; slots.is_cpu() && row < slots.size(0); ++row) {
    check(all[row] >= 0 && all[row] < table.size(0), op, ": slot ", all[row], " is outside the ", name, " of ",
          table.size(0));
  }
  return all;
}

const int64_t* checked_state_slots(const char* op, const Tensor& state, const Tensor& slots) {
  check(state.dim() == 2 && slots.dim() == 1, op, ": state must be [slots, ", kFields, "], slots [B]");
  check_tensor(op, "state", state, state, ScalarType::Long, {state.size(0), kFields});
  return checked_slots<int64_t>(op, "state", state, slots);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> begin_cycle(Tensor state, Tensor slots, int64_t width,
                                                              int64_t block) {
  constexpr const char* kOp = "begin_cycle";
  BeginCycleParams p{};
  p.slots = checked_state_slots(kOp, state, slots);
  check(width >= 0 && block >= 0, kOp, ": width is ", width, ", block ", block);
  p.rows = slots.size(0);
  p.width = width;
  p.block = block;
  p.state_rows = state.size(0);
  p.state = numbers(state);
  Tensor readings = new_empty(state, {kReadings, p.rows}, ScalarType::Long);
  Tensor slots32 = new_empty(state, {p.rows}, ScalarType::Int);
  Tensor positions = new_empty(state, {p.rows, width + 1}, ScalarType::Long);
  Tensor block_positions = new_empty(state, {p.rows, block}, ScalarType::Long);
  Tensor block_places = new_empty(state, {p.rows, block}, ScalarType::Long);
  p.readings = numbers(readings);
  p.slots32 = static_cast<int32_t*>(slots32.data_ptr());
  p.positions = numbers(positions);
  p.block_positions = numbers(block_positions);
  p.block_places = numbers(block_places);
  if (state.is_cpu()) {
    for (int64_t row = 0; row < p.rows; ++row) begin_cycle_row(p, row, 0, 1);
  } else if (p.rows > 0) {
    DFLASH_RUN_ON_GPU(kOp, begin_cycle_sm80, p, state);
  }
  return {readings, slots32, positions, block_positions, block_places};
}

uint64_t exponent_bits(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return 0x7f80;
  if (dtype == ScalarType::Half) return 0x7c00;
  return dtype == ScalarType::Float ? 0x7f800000 : 0x7ff0000000000000;
}

std::tuple<Tensor, Tensor> end_cycle(Tensor state, Tensor slots, Tensor stops, Tensor readings, Tensor drafted,
                                     Tensor accepted, Tensor next, Tensor logits) {
  constexpr const char* kOp = "end_cycle";
  EndCycleParams p{};
  p.slots = checked_state_slots(kOp, state, slots);
  check(drafted.dim() == 2 && stops.dim() == 2 && logits.dim() == 3, kOp,
        ": drafted must be [B, K], stops [slots, n], logits [B, K + 1, V]");
  p.rows = slots.size(0);
  p.width = drafted.size(1);
  p.stop_count = stops.size(1);
  p.state_rows = state.size(0);
  p.vocabulary = logits.size(2);
  check_tensor(kOp, "stops", stops, state, ScalarType::Long, {p.state_rows, p.stop_count});
  check_tensor(kOp, "readings", readings, state, ScalarType::Long, {kReadings, p.rows});
  check_tensor(kOp, "drafted", drafted, state, ScalarType::Long, {p.rows, p.width});
  check_tensor(kOp, "accepted", accepted, state, ScalarType::Long, {p.rows});
  check_tensor(kOp, "next", next, state, ScalarType::Long, {p.rows});
  const ScalarType dtype = logits.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
            dtype == ScalarType::Double,
        kOp, ": logits must be floating");
  check_tensor(kOp, "logits", logits, state, dtype, {p.rows, p.width + 1, p.vocabulary});
  p.logits = logits.data_ptr();
  p.logit_bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  p.exponent = exponent_bits(dtype);
  Tensor records = new_empty(state, {p.rows, 4 + p.width}, ScalarType::Long);
  Tensor kept = new_empty(state, {p.rows, p.width + 1}, ScalarType::Long);
  p.state = numbers(state);
  p.stops = numbers(stops);
  p.readings = numbers(readings);
  p.drafted = numbers(drafted);
  p.accepted = numbers(accepted);
  p.next = numbers(next);
  p.records = numbers(records);
  p.kept = numbers(kept);
  if (state.is_cpu()) {
    for (int64_t row = 0; row < p.rows; ++row) end_cycle_row(p, row, finds_stop(p, row, 0, 1), 0, 1);
  } else if (p.rows > 0) {
    DFLASH_RUN_ON_GPU(kOp, end_cycle_sm80, p, state);
  }
  return {records, kept};
}

RingParams ring_params(const char* op, const Tensor& ring, const Tensor& slots, int64_t tokens) {
  check(ring.dim() == 3 && slots.dim() == 1 && tokens >= 0, op, ": ring must be [slots, size, W], slots [B]");
  check_tensor(op, "ring", ring, ring, ring.scalar_type(), {ring.size(0), ring.size(1), ring.size(2)});
  check(ring.size(1) > 0 && ring.size(2) > 0, op, ": ring has no place for a token");
  RingParams p{};
  p.slots = checked_slots<int32_t>(op, "ring", ring, slots);
  p.rows = slots.size(0);
  p.tokens = tokens;
  p.bytes = ring.size(2) * int64_t(ring.element_size());
  p.size = ring.size(1);
  p.ring = static_cast<char*>(ring.data_ptr());
  return p;
}

void write_ring(Tensor ring, Tensor values, Tensor positions, Tensor slots) {
  constexpr const char* kOp = "write_ring";
  check(values.dim() == 3, kOp, ": values must be [B, R, W]");
  RingParams p = ring_params(kOp, ring, slots, values.size(1));
  check_tensor(kOp, "values", values, ring, ring.scalar_type(), {p.rows, p.tokens, ring.size(2)});
  check_tensor(kOp, "positions", positions, ring, ScalarType::Long, {p.rows, p.tokens});
  p.values = static_cast<char*>(values.data_ptr());
  p.positions = numbers(positions);
  if (ring.is_cpu()) {
    for (int64_t token = 0; token < p.rows * p.tokens; ++token) {
      if (p.positions[token] < 0) continue;
      char* place = place_in_ring(p, token / p.tokens, p.positions[token]);
      std::memcpy(place, p.values + token * p.bytes, size_t(p.bytes));
    }
  } else if (p.rows * p.tokens > 0) {
    DFLASH_RUN_ON_GPU(kOp, write_ring_sm80, p, ring);
  }
}

std::tuple<Tensor, Tensor> read_ring(Tensor ring, Tensor start, Tensor counts, Tensor slots, int64_t tokens) {
  constexpr const char* kOp = "read_ring";
  RingParams p = ring_params(kOp, ring, slots, tokens);
  check_tensor(kOp, "start", start, ring, ScalarType::Long, {p.rows});
  check_tensor(kOp, "counts", counts, ring, ScalarType::Long, {p.rows});
  Tensor values = new_empty(ring, {p.rows, tokens, ring.size(2)}, ring.scalar_type());
  Tensor positions = new_empty(ring, {p.rows, tokens}, ScalarType::Long);
  p.start = numbers(start);
  p.counts = numbers(counts);
  p.values = static_cast<char*>(values.data_ptr());
  p.positions = numbers(positions);
  if (ring.is_cpu()) {
    for (int64_t token = 0; token < p.rows * tokens; ++token) {
      const int64_t row = token / tokens, position = waiting_position(p, row, token % tokens);
      p.positions[token] = position;
      char* value = p.values + token * p.bytes;
      if (position < 0) {
        std::memset(value, 0, size_t(p.bytes));
      } else {
        std::memcpy(value, place_in_ring(p, row, position), size_t(p.bytes));
      }
    }
  } else if (p.rows * tokens > 0) {
    DFLASH_RUN_ON_GPU(kOp, read_ring_sm80, p, ring);
  }
  return {values, positions};
}

Tensor mark_time(Tensor like) {
  constexpr const char* kOp = "mark_time";
  check(!like.is_cpu(), kOp, ": it reads a GPU's clock");
  Tensor time = new_empty(like, {}, ScalarType::Long);
#ifdef DFLASH_EXT_CUDA
  const CudaScope cuda(like);
  check_launch(kOp, mark_time_sm80(numbers(time), cuda.stream()));
#else
  fail(kOp, ": this build has no CUDA kernels");
#endif
  return time;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) {
  m.def(
      "begin_cycle(Tensor state, Tensor slots, int width, int block) -> (Tensor readings, Tensor slots32, "
      "Tensor positions, Tensor block_positions, Tensor block_places)");
  m.def(
      "end_cycle(Tensor(a!) state, Tensor slots, Tensor stops, Tensor readings, Tensor drafted, Tensor accepted, "
      "Tensor next, Tensor logits) -> (Tensor records, Tensor kept)");
  m.def("write_ring(Tensor(a!) ring, Tensor values, Tensor positions, Tensor slots) -> ()");
  m.def(
      "read_ring(Tensor ring, Tensor start, Tensor counts, Tensor slots, int tokens) -> (Tensor values, "
      "Tensor positions)");
  m.def("mark_time(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("begin_cycle", TORCH_BOX(&begin_cycle));
  m.impl("end_cycle", TORCH_BOX(&end_cycle));
  m.impl("write_ring", TORCH_BOX(&write_ring));
  m.impl("read_ring", TORCH_BOX(&read_ring));
  m.impl("mark_time", TORCH_BOX(&mark_time));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("mark_time", TORCH_BOX(&mark_time));
  m.impl("begin_cycle", TORCH_BOX(&begin_cycle));
  m.impl("end_cycle", TORCH_BOX(&end_cycle));
  m.impl("write_ring", TORCH_BOX(&write_ring));
  m.impl("read_ring", TORCH_BOX(&read_ring));
}

}  // namespace dflash
