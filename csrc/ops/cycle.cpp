// Operators of the cycle family. dflash_ext/ops/cycle.py documents the semantics.
#include "cycle/params.h"

#include <tuple>

#include "common/tensor.h"

namespace dflash {
namespace {

int64_t* numbers(Tensor& tensor) { return static_cast<int64_t*>(tensor.data_ptr()); }
const int64_t* numbers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.data_ptr()); }

void check_state(const char* op, const Tensor& state, const Tensor& slots) {
  check(state.dim() == 2 && slots.dim() == 1, op, ": state must be [slots, ", kFields, "], slots [B]");
  check_tensor(op, "state", state, state, ScalarType::Long, {state.size(0), kFields});
  check_tensor(op, "slots", slots, state, ScalarType::Long, {slots.size(0)});
  if (!slots.is_cpu()) return;
  for (int64_t row = 0; row < slots.size(0); ++row) {
    const int64_t slot = numbers(slots)[row];
    check(slot >= 0 && slot < state.size(0), op, ": slot ", slot, " is outside the state of ", state.size(0));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> begin_cycle(Tensor state, Tensor slots, int64_t width,
                                                              int64_t block) {
  constexpr const char* kOp = "begin_cycle";
  check_state(kOp, state, slots);
  check(width >= 0 && block >= 0, kOp, ": width is ", width, ", block ", block);
  BeginCycleParams p{};
  p.rows = slots.size(0);
  p.width = width;
  p.block = block;
  p.state_rows = state.size(0);
  p.state = numbers(state);
  p.slots = numbers(slots);
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
#ifdef DFLASH_EXT_CUDA
    const CudaScope cuda(state);
    check_launch(kOp, begin_cycle_sm80(p, cuda.stream()));
#else
    fail(kOp, ": this build has no CUDA kernels");
#endif
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
  check_state(kOp, state, slots);
  check(drafted.dim() == 2 && stops.dim() == 2 && logits.dim() == 3, kOp,
        ": drafted must be [B, K], stops [slots, n], logits [B, K + 1, V]");
  EndCycleParams p{};
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
  p.slots = numbers(slots);
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
#ifdef DFLASH_EXT_CUDA
    const CudaScope cuda(state);
    check_launch(kOp, end_cycle_sm80(p, cuda.stream()));
#else
    fail(kOp, ": this build has no CUDA kernels");
#endif
  }
  return {records, kept};
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
  m.def("mark_time(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CPU, m) {
  m.impl("begin_cycle", TORCH_BOX(&begin_cycle));
  m.impl("end_cycle", TORCH_BOX(&end_cycle));
  m.impl("mark_time", TORCH_BOX(&mark_time));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) {
  m.impl("mark_time", TORCH_BOX(&mark_time));
  m.impl("begin_cycle", TORCH_BOX(&begin_cycle));
  m.impl("end_cycle", TORCH_BOX(&end_cycle));
}

}  // namespace dflash
