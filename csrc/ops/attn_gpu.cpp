// Attention on a GPU: plans, and which kernel serves a call.
#include "ops/attn.h"

#include <algorithm>
#include <bit>

#include "attn/decode_wide.h"
#include "attn/kernels.h"

namespace dflash {

#ifdef DFLASH_EXT_CUDA

namespace {

#ifndef DFLASH_EXT_HOPPER
constexpr bool forward_sm90_runs_here() { return false; }
constexpr uint32_t forward_sm90_misses(const AttentionForwardParams&) { return kNoSuchKernel; }
constexpr const char* forward_sm90(const AttentionForwardParams&, void*) { return nullptr; }
constexpr uint32_t decode_sm90_misses(const DecodeParams&) { return kNoSuchKernel; }
constexpr const char* decode_sm90(const DecodeParams&, void*) { return nullptr; }
constexpr uint32_t backward_sm90_misses(const BackwardParams&, bool) { return kNoSuchKernel; }
constexpr void backward_sm90_layout(BackwardParams&, void*) {}
constexpr const char* backward_sm90(const BackwardParams&, void*) { return nullptr; }
#endif

// Positions of a tile of rows.
int64_t positions_of(int64_t heads, int64_t kv_heads, int64_t head_dim, bool hopper) {
  return (hopper ? hopper_tile_rows(head_dim) : tile_rows(head_dim)) / fold_of(heads, kv_heads);
}

Tensor make_plan(const Mask& mask, int64_t kv_len, int64_t positions) {
  constexpr const char* kOp = "block_attn_plan";
  const int64_t entries = mask.ctx_lo.size(0), q_len = mask.ctx_lo.size(1);
  const int64_t tiles = entries * tiles_of(q_len, positions);
  check(tiles < int64_t(1) << 31, kOp, ": the mask has ", tiles, " tiles of rows; fewer than 2^31 are supported");
  Tensor plan = new_empty(mask.ctx_lo, {tiles, kTilePlanInts}, ScalarType::Int);
  const Tensor scratch = new_empty(mask.ctx_lo, {plan_scratch_ints(tiles)}, ScalarType::Int);
  const PlanParams p{intervals(kOp, mask, entries, q_len),           entries, q_len, kv_len, positions,
                     static_cast<int32_t*>(plan.data_ptr()), static_cast<int32_t*>(scratch.data_ptr())};
  const CudaScope scope(mask.ctx_lo);
  check_launch(kOp, plan_sm80(p, scope.stream()));
  return plan;
}

// A plan, and how many of the kernel's tiles lie in a tile of it.
struct UsedPlan {
  Tensor tiles;
  int64_t parts;
};

// The given plan where it fits, or one made now. `positions` are those of the kernel's tiles, `planned` those of the
// tiles that block_attn_plan makes here: the portable kernels take these, too, where they are larger than their own.
UsedPlan plan_for(const std::optional<Tensor>& given, const Tensor& q, const Mask& mask, int64_t kv_len,
                  int64_t positions, int64_t planned) {
  const bool is_plan = given && given->dim() == 2 && given->size(1) == kTilePlanInts &&
                       given->scalar_type() == ScalarType::Int && given->is_contiguous() &&
                       given->get_device_index() == q.get_device_index();
  // Two plans of one mask with equally many tiles are the same: tiles of one size, or one tile that holds all rows.
  const auto has_tiles_of = [&](int64_t size) {
    return is_plan && given->size(0) == mask.ctx_lo.size(0) * tiles_of(q.size(2), size);
  };
  if (has_tiles_of(positions)) return {*given, 1};
  if (has_tiles_of(planned)) return {*given, planned / positions};
  return {make_plan(mask, kv_len, positions), 1};
}

Tensor plan(Tensor ctx_lo, Tensor ctx_hi, Tensor blk_lo, Tensor blk_hi, int64_t kv_len, int64_t heads,
            int64_t kv_heads, int64_t head_dim, bool decode) {
  check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "block_attn_plan: ", heads,
        " query heads are no multiple of ", kv_heads, " key heads");
  const CudaScope scope(ctx_lo);
  AttentionParams p{};
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.q_len = ctx_lo.size(1);
  p.head_dim = head_dim;
  const bool hopper = forward_sm90_runs_here();
  const int64_t positions = decode ? decode_positions(p, hopper) : positions_of(heads, kv_heads, head_dim, hopper);
  return make_plan({ctx_lo, ctx_hi, blk_lo, blk_hi}, kv_len, positions);
}

}  // namespace

void run_forward_on_gpu(AttentionForwardParams& p, const Tensor& q, const Mask& mask,
                        const std::optional<Tensor>& plan) {
  constexpr const char* kOp = "block_attn";
  check(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kOp,
        ": on a GPU q, k and v must be bfloat16 or float16");
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return;
  const CudaScope scope(q);
  p.plan_entries = mask.ctx_lo.size(0);
  const auto positions = [&](bool hopper) { return positions_of(p.heads, p.kv_heads, p.head_dim, hopper); };
  const bool hopper = hopper_serves(forward_sm90_misses(p));
  const UsedPlan used =
      plan_for(plan, q, mask, p.kv_len, positions(hopper), positions(forward_sm90_runs_here()));
  p.plan = static_cast<const int32_t*>(used.tiles.data_ptr());
  p.plan_parts = used.parts;
  check_launch(kOp, hopper ? forward_sm90(p, scope.stream()) : forward_sm80(p, scope.stream()));
}

void run_backward_on_gpu(BackwardParams& p, const Tensor& q, bool deterministic) {
  constexpr const char* kOp = "block_attn_backward";
  check(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kOp,
        ": on a GPU q, k and v must be bfloat16 or float16");
  if (p.batch == 0 || p.heads == 0) return;
  const CudaScope scope(q);
  const auto allocate = [&]<class Data>(Data*& data, int64_t count, int64_t size) {
    Tensor memory = new_empty(q, {count * size}, ScalarType::Byte);
    data = static_cast<Data*>(memory.data_ptr());
    return memory;
  };
  const bool hopper = hopper_serves(backward_sm90_misses(p, deterministic));
  p.fold = backward_fold_of(p.heads, p.kv_heads);
  p.tile_rows = hopper ? hopper_backward_rows(p.head_dim) : backward_tile_rows(p.head_dim);
  p.row_tiles = tiles_of(p.q_len, p.tile_rows / p.fold);
  const int64_t rows = p.row_tiles * p.tile_rows, groups = p.batch * p.heads / p.fold;
  const Tensor tiles = allocate(p.tiles, p.entries * p.row_tiles, sizeof(RowTile)),
               keys = allocate(p.keys, p.entries * rows / p.fold, sizeof(RowKeys)),
               stats = allocate(p.stats, groups * rows * 2, sizeof(float));
  p.is_deterministic = deterministic;
  p.tile_dim = std::max<int64_t>(64, std::bit_ceil(static_cast<uint64_t>(p.head_dim)));
  Tensor grad_q_sums;
  if (hopper || portable_backward_adds(p.head_dim, deterministic)) {
    grad_q_sums = allocate(p.grad_q_sums, groups * rows * p.tile_dim, sizeof(float));
  }
  if (!hopper) {
    p.adds_to_zeros = p.grad_q_sums != nullptr;
    if (rows > 0) check_launch(kOp, backward_prepare(p, scope.stream()));
    return check_launch(kOp, backward_sm80(p, scope.stream()));
  }
  backward_sm90_layout(p, scope.stream());
  const int64_t key_tiles = p.batch * p.kv_heads * p.key_tiles;
  const Tensor seen = allocate(p.seen, p.entries * (p.key_tiles + 1), sizeof(int32_t)),
               items = allocate(p.items, key_tiles + p.sections * p.blocks, sizeof(BackwardItem)),
               first_items = allocate(p.first_items, p.sections * p.blocks, sizeof(int32_t)),
               grad_key_sums = allocate(p.grad_key_sums, key_tiles * 2 * p.tile_keys * p.tile_dim, sizeof(float));
  Tensor is_split, rows_added, keys_added, sections_added, seen_by, turns;
  if (p.adds_to_zeros) {
    is_split = allocate(p.is_split, key_tiles, sizeof(int32_t));
  } else {
    sections_added = allocate(p.sections_added, p.sections, sizeof(int32_t));
  }
  if (!p.adds_to_zeros || deterministic) {
    const int64_t cluster = hopper_backward_cluster(p.head_dim);
    rows_added = allocate(p.rows_added, groups * p.row_tiles * cluster, sizeof(int32_t));
    keys_added = allocate(p.keys_added, key_tiles * 4, sizeof(int32_t));
  }
  if (deterministic) {
    seen_by = allocate(p.seen_by, p.entries * p.key_tiles * tiles_of(p.row_tiles, 32), sizeof(SeenBy));
    turns = allocate(p.turns, groups * p.row_tiles * p.key_tiles, sizeof(uint16_t));
  }
  check_launch(kOp, backward_prepare(p, scope.stream()));
  check_launch(kOp, backward_sm90(p, scope.stream()));
}

namespace {

// Decodes by the forward (attn/decode_wide.h).
void run_wide_decode(const DecodeParams& p, const Tensor& q, const Mask& mask, void* stream) {
  constexpr const char* kOp = "block_attn_decode";
  const int64_t rows = 2 * p.q_len, entries = mask.ctx_lo.size(0);
  const auto allocate = [&](int64_t heads, int64_t length) {
    return new_empty(q, {p.batch, heads, length, p.head_dim}, q.scalar_type());
  };
  const Tensor both_q = allocate(p.heads, rows), both_out = allocate(p.heads, rows),
               keys = allocate(p.kv_heads, p.kv_len), values = allocate(p.kv_heads, p.kv_len),
               lse = new_empty(q, {p.batch, p.heads, rows}, ScalarType::Float),
               bounds = new_empty(mask.ctx_lo, {4, entries, rows}, ScalarType::Int);
  WideDecodeParams wide{};
  static_cast<AttentionParams&>(wide) = p;
  wide.mask_entries = entries;
  wide.both_q = both_q.data_ptr();
  wide.keys = keys.data_ptr();
  wide.values = values.data_ptr();
  wide.bounds = static_cast<int32_t*>(bounds.data_ptr());
  wide.both_out = both_out.data_ptr();
  wide.lse = static_cast<const float*>(lse.data_ptr());
  wide.out = p.out;
  wide.out_strides = p.out_strides;
  check_launch(kOp, wide_decode_split(wide, stream));

  const Tensor bound[] = {torch::stable::select(bounds, 0, 0), torch::stable::select(bounds, 0, 1),
                          torch::stable::select(bounds, 0, 2), torch::stable::select(bounds, 0, 3)};
  const Mask halves{bound[0], bound[1], bound[2], bound[3]};
  const auto strides = [&](int64_t heads, int64_t length) {
    return HeadStrides{heads * length * p.head_dim, length * p.head_dim, p.head_dim};
  };
  AttentionForwardParams forward{};
  static_cast<AttentionParams&>(forward) = p;
  forward.pages = {};
  forward.q_len = rows;
  forward.mask = intervals(kOp, halves, p.batch, rows);
  forward.q = wide.both_q;
  forward.k = wide.keys;
  forward.v = wide.values;
  forward.out = both_out.data_ptr();
  forward.lse = lse.data_ptr();
  forward.q_strides = forward.out_strides = strides(p.heads, rows);
  forward.k_strides = forward.v_strides = strides(p.kv_heads, p.kv_len);
  run_forward_on_gpu(forward, both_q, halves, std::nullopt);
  check_launch(kOp, wide_decode_join(wide, stream));
}

}  // namespace

void run_decode_on_gpu(DecodeParams& p, const Tensor& q, const Mask& mask, const std::optional<Tensor>& plan) {
  constexpr const char* kOp = "block_attn_decode";
  check(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kOp,
        ": on a GPU q and the caches must be bfloat16 or float16");
  if (p.batch == 0 || p.heads == 0 || p.q_len == 0) return;
  const CudaScope scope(q);
  if (forward_sm90_runs_here() && p.head_dim > kMostDecodeDim && p.q_len >= kLeastWideRows && p.kv_len > 0 && !p.exact) {
    return run_wide_decode(p, q, mask, scope.stream());
  }
  p.plan_entries = mask.ctx_lo.size(0);
  const bool hopper = hopper_serves(decode_sm90_misses(p));
  const UsedPlan used = plan_for(plan, q, mask, p.kv_len, decode_positions(p, hopper, p.exact),
                                 decode_positions(p, forward_sm90_runs_here()));
  p.plan = static_cast<const int32_t*>(used.tiles.data_ptr());
  p.plan_parts = used.parts;
  if (hopper) return check_launch(kOp, decode_sm90(p, scope.stream()));
  DecodeGrid grid{};
  check_launch(kOp, decode_sm80_grid(p, scope.stream(), &grid));
  const Tensor workspace = new_empty(q, {grid.workspace_bytes}, ScalarType::Byte);
  check_launch(kOp, decode_sm80(p, grid, workspace.data_ptr(), scope.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("block_attn_plan", TORCH_BOX(&plan)); }

#else

void run_forward_on_gpu(AttentionForwardParams&, const Tensor&, const Mask&, const std::optional<Tensor>&) {
  fail("block_attn: this build has no CUDA kernels");
}
void run_backward_on_gpu(BackwardParams&, const Tensor&, bool) {
  fail("block_attn_backward: this build has no CUDA kernels");
}
void run_decode_on_gpu(DecodeParams&, const Tensor&, const Mask&, const std::optional<Tensor>&) {
  fail("block_attn_decode: this build has no CUDA kernels");
}

#endif

}  // namespace dflash
