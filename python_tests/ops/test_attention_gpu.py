"""block_attn's GPU kernels against the definition in float64 and against PyTorch's attention in the same dtype."""

import math
import os
import subprocess
import sys

import pytest
import torch

from dflash_ext import IntervalMask, block_attn, reference
from python_tests.exactness import allowed_error
from python_tests.ops.test_attention import MASKS, distance, inputs, sdpa

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

HALVES = [torch.bfloat16, torch.float16]


def check(mask, q, k, v, **options):
    """Output and LSE; the output must be at most 1.5 times as wrong as PyTorch's, where PyTorch has the option."""
    got, lse = block_attn(q, k, v, mask, return_lse=True, **options)
    want, want_lse = reference.block_attn(q.double(), k.double(), v.double(), mask, return_lse=True, **options)
    rounding = torch.finfo(q.dtype).eps / 4
    if "softcap" not in options:
        limit = allowed_error(distance(sdpa(q, k, v, mask, options.get("scale")), want), rounding)
    else:
        limit = 8 * rounding
    assert got.dtype == q.dtype and distance(got, want) <= limit
    empty = want_lse.isinf()
    assert torch.equal(lse == -math.inf, empty) and not got[empty].any()
    scale = want_lse[~empty].abs().max().clamp(min=1) if (~empty).any() else 1
    torch.testing.assert_close(lse[~empty].double(), want_lse[~empty], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_mask(mask, head_dim, dtype):
    mask = mask().to("cuda")
    check(mask, *inputs(mask, "cuda", dtype, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [8, 40, 72, 96, 136, 200, 264, 504])
def test_every_head_dim(head_dim):
    mask = IntervalMask.prefix_block(277, 131, device="cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim, batch=1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1), (8, 8), (12, 1), (32, 8), (64, 1), (128, 1)])
def test_every_ratio_of_heads(heads, kv_heads):
    mask = MASKS["anchors"]().to("cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, heads, kv_heads, head_dim=64))


@pytest.mark.parametrize(
    "options", [{"scale": -0.3}, {"scale": 0.0}, {"softcap": 2.0}, {"softcap": 5.0, "scale": -1.0}]
)
def test_options(options):
    mask = MASKS["block_causal"]().to("cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, head_dim=128), **options)


def test_large_scores():
    mask = MASKS["prefix_block"]().to("cuda")
    q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=128)
    check(mask, 10 * q, 10 * k, v)
    q, k = 1000 * q, 10 * k
    want = reference.block_attn(q.double(), k.double(), v.double(), mask)
    assert distance(block_attn(q, k, v, mask), want) < 5e-3


def test_long_rows():
    mask = IntervalMask.prefix_block(torch.tensor([9000, 8111], device="cuda"), 4500, max_len=9000)
    check(mask, *inputs(mask, "cuda", torch.bfloat16, heads=2, kv_heads=1, head_dim=128))


def random_intervals(batch, q_len, kv_len):
    """Intervals in any order and place, also beyond the keys."""
    return IntervalMask(*torch.randint(-9, kv_len + 9, (4, batch, q_len), dtype=torch.int32, device="cuda"), kv_len)


def test_random_intervals():
    for case in range(60):
        torch.manual_seed(case)
        q_len, kv_len = torch.randint(1, 700, (2,)).tolist()
        mask = random_intervals((1, 2)[case % 2], q_len, kv_len)
        heads, kv_heads, head_dim = [(4, 2, 64), (3, 1, 128), (16, 2, 80), (2, 2, 256), (8, 1, 320)][case % 5]
        check(mask, *inputs(mask, "cuda", HALVES[case % 2], heads, kv_heads, head_dim))


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_strides(offset):
    """Heads inside rows as a fused projection leaves them; where addresses are odd the portable kernel serves."""
    mask = MASKS["causal"]().to("cuda")
    fused = torch.randn(2, mask.q_len, 6 * 64 + 16, device="cuda", dtype=torch.bfloat16)[..., offset : offset + 6 * 64]
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in fused.split((4 * 64, 64, 64), dim=-1))
    check(mask, q, k, v)
    assert block_attn(q, k, v, mask).transpose(1, 2).is_contiguous()


def test_batch_and_heads_of_any_size_share_one_tensor():
    mask = IntervalMask.causal(130, device="cuda")
    q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=64)
    check(mask, q, k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(shape):
    batch, q_len, kv_len = shape
    mask = IntervalMask(*torch.zeros(4, 1, q_len, dtype=torch.int32, device="cuda"), kv_len)
    q, k, v = inputs(mask, "cuda", torch.bfloat16, batch=batch)
    out, lse = block_attn(q, k, v, mask, return_lse=True)
    assert out.shape == q.shape and not out.any() and (lse == -math.inf).all()


# ------------------------------------------------------------------------------------------------- plans


def is_sorted(plan, kv_len):
    """The most keys first; in a plan of many tiles up to eighths of an octave, and down to kv_len / 256."""
    keys = plan[:, 2]
    if len(plan) > 1024:
        steps = torch.cat((keys, keys.new_tensor([kv_len]))).float().view(torch.int32) >> 20
        keys = steps[:-1].clamp(min=steps[-1] - 63)
    return (keys[:-1] >= keys[1:]).all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_plan_tells_which_keys_a_tile_needs(mask):
    mask = mask().to("cuda")
    visible = mask.to_bool()[:, 0]
    plan = mask.plan(8, 2, 128).tiles.cpu()
    per_entry = plan.shape[0] // mask.batch
    positions = -(-mask.q_len // per_entry)
    positions = next(p for p in (2, 4, 8, 16, 32, 64, 128, 256) if -(-mask.q_len // p) == per_entry and p >= positions)
    assert sorted(map(tuple, plan[:, :2].tolist())) == [
        (entry, tile * positions) for entry in range(mask.batch) for tile in range(per_entry)
    ]
    assert is_sorted(plan, mask.kv_len)
    for entry, first, keys, lo0, lo1, hi0, hi1, full_lo0, full_lo1, full_hi0, full_hi1, _ in plan.tolist():
        rows = visible[entry, first : first + positions]
        needed = torch.zeros(mask.kv_len, dtype=torch.bool, device="cuda")
        needed[lo0:hi0] = needed[lo1:hi1] = True
        assert not (rows & ~needed).any() and keys == needed.sum()
        assert not keys or (rows[:, lo0].any() and rows[:, max(hi0, hi1) - 1].any())
        assert rows[:, full_lo0:full_hi0].all() and rows[:, full_lo1:full_hi1].all()


def test_most_tiles_of_a_prefix_are_full():
    plan = IntervalMask.prefix_block(2048, 1024, device="cuda").plan(1, 1, 128).tiles
    full = (plan[:, 9:11] - plan[:, 7:9]).sum(1)
    assert (full[plan[:, 1] >= 1024] == 2048).all() and (full >= plan[:, 1]).all()


@pytest.mark.parametrize(("batch", "rows"), [(1, 40000), (64, 16384), (300, 5000), (9, 17), (64, 512), (41, 800)])
def test_a_plan_of_many_tiles_is_whole_and_sorted(batch, rows):
    lens = torch.randint(rows + 1, (batch,), device="cuda")
    mask = IntervalMask.block_causal(lens, 16, max_len=rows)
    plan, tiles = mask.plan(8, 2, 128).tiles, -(-rows // 32)
    found = plan[:, 0].long() * tiles + plan[:, 1] // 32
    assert torch.equal(found.sort().values, torch.arange(batch * tiles, device="cuda"))
    assert is_sorted(plan, rows)
    assert torch.equal(mask.plan(8, 2, 128).tiles, plan)
    entry = batch // 2
    alone = IntervalMask(*(bound[entry : entry + 1] for bound in mask._bounds()), rows).plan(8, 2, 128).tiles
    of_entry = plan[plan[:, 0] == entry]
    assert torch.equal(of_entry[of_entry[:, 1].argsort(), 1:], alone[alone[:, 1].argsort(), 1:])


# A planned mask whose bounds change afterwards, which no version counter tells under inference mode.
CHANGES = {
    "more": lambda mask: mask.ctx_hi[:, ::7].add_(40),
    "less": lambda mask: mask.ctx_hi[:, ::7].sub_(90),
    "none": lambda mask: mask.ctx_hi[:, ::7].zero_(),
    "far": lambda mask: mask.blk_lo[:, ::7].zero_() + mask.blk_hi[:, ::7].fill_(5),
    "all": lambda mask: [bound.copy_(torch.randint_like(bound, 400)) for bound in mask._bounds()],
}


def is_right_or_nan(got, lse, q, k, v, mask, may_be_nan):
    """Every row is right for the mask's bounds as they are, or NaN where it may be."""
    bad = got.isnan()
    rows = bad.any(-1)
    want = reference.block_attn(q.double(), k.double(), v.double(), mask)
    assert torch.equal(bad.all(-1), rows) and (lse is None or torch.equal(lse.isnan(), rows))
    assert not (rows & ~may_be_nan).any()
    assert distance(got.masked_fill(bad, 0), want.masked_fill(bad, 0)) < 8e-3
    return rows


@pytest.mark.parametrize("layout", ["aligned", "odd"])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plan_of_bounds_that_have_changed_gives_nan(change, head_dim, layout):
    with torch.inference_mode():
        mask = IntervalMask.prefix_block(torch.tensor([400, 300], device="cuda"), 150, max_len=400).plan(4, 2, head_dim)
        q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)
        if layout == "odd":
            q = torch.nn.functional.pad(q, (1, 0))[..., 1:]
        before, nowhere = torch.stack(mask._bounds()), torch.zeros(2, 1, 400, dtype=torch.bool, device="cuda")
        block_attn(q, k, v, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block_attn(q, k, v, mask, return_lse=True)
        assert not is_right_or_nan(*block_attn(q, k, v, mask, return_lse=True), q, k, v, mask, nowhere).any()
        change(mask)
        changed = (torch.stack(mask._bounds()) != before).any(0)[:, None]
        rows = is_right_or_nan(*block_attn(q, k, v, mask, return_lse=True), q, k, v, mask, changed)
        assert rows.any()
        graph.replay()
        assert torch.equal(is_right_or_nan(*captured, q, k, v, mask, changed), rows)


@pytest.mark.parametrize("head_dim", [64, 128, 512])
def test_a_plan_without_keys_gives_nan_once_there_are_some(head_dim):
    mask = IntervalMask(*torch.zeros(4, 1, 300, dtype=torch.int32, device="cuda"), 200).plan(4, 2, head_dim)
    q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)
    mask.blk_hi[:, 7] = 9
    assert block_attn(q, k, v, mask).isnan().any(-1).nonzero()[:, 2].unique().tolist() == [7]


# ---------------------------------------------------------------------------------------- graphs, compile


def test_one_graph_serves_other_masks_of_the_same_shape():
    def build(prefix):
        return IntervalMask.prefix_block(lens, prefix, max_len=300)

    lens, prefix = torch.tensor([300, 200], device="cuda"), torch.tensor([100, 50], device="cuda")
    q, k, v = inputs(build(prefix), "cuda", torch.bfloat16, head_dim=128)
    block_attn(q, k, v, build(prefix))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_attn(q, k, v, build(prefix).plan(4, 2, 128))
    prefix.copy_(torch.tensor([7, 170]))
    q.normal_()
    graph.replay()
    assert torch.equal(out, block_attn(q, k, v, build(prefix)))


def test_compiles_whole_with_a_planned_mask():
    mask = MASKS["block_causal"]().to("cuda").plan(4, 2, 64)
    tensors = inputs(mask, "cuda", torch.bfloat16, head_dim=64)
    compiled = torch.compile(block_attn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, mask), block_attn(*tensors, mask))


def test_compiles_whole_with_a_plan_made_inside():
    def attend(q, k, v, prefix):
        return block_attn(q, k, v, IntervalMask.prefix_block(150, prefix).plan(4, 2, 64))

    prefix = torch.tensor([60, 7], device="cuda")
    tensors = inputs(IntervalMask.prefix_block(150, 60), "cuda", torch.bfloat16, head_dim=64)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, prefix), attend(*tensors, prefix))


def test_opcheck():
    mask = MASKS["block_causal"]().to("cuda")
    tensors = inputs(mask, "cuda", torch.bfloat16, head_dim=64)
    bounds = mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.dflash_ext.block_attn, (*tensors, *bounds, mask.kv_len, None, 0.1, None, False), test_utils=tests
    )


def test_two_streams_at_once():
    mask = MASKS["prefix_block"]().to("cuda").plan(4, 2, 128)
    tensors = inputs(mask, "cuda", torch.bfloat16, head_dim=128)
    want = block_attn(*tensors, mask)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(block_attn(*tensors, mask))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_portable_kernel():
    """The same tests as on a GPU that is not Hopper."""
    if os.environ.get("DFLASH_EXT_GPU"):
        return
    names = "every or options or random or large or long or plan or nothing"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names],
        env=os.environ | {"DFLASH_EXT_GPU": "portable"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
