"""Gradients of block_attn on a GPU against the definition in float64 and PyTorch's attention in the same dtype."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import IntervalMask, block_attn, reference
from python_tests.ops.test_attention import MASKS, distance, inputs, sdpa, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

HALVES = [torch.bfloat16, torch.float16]


def fused_sdpa(q, k, v, mask, scale=None):
    """PyTorch's attention by a kernel that keeps no matrix of scores, where it has one: with a mask it takes no GQA."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return sdpa(q, k, v, mask, scale)


def check(mask, q, k, v, lse_weight=0.0, **options):
    """Gradients at most 1.5 times as wrong as PyTorch's, where PyTorch has the option.

    As in FlashAttention, the kernels compute rowsum(gradient * output) from the rounded output. The gradient of each
    score is then off by its probability times the change of that sum, as if the LSE had a gradient of this size. Where
    the softmax is peaked, this exceeds all other roundings, so it is allowed on top.
    """
    upstreams = torch.randn_like(q), lse_weight * torch.randn(q.shape[:-1], device="cuda")
    options_of_lse = options | {"return_lse": True}
    ours = with_gradients(partial(block_attn, mask=mask, **options_of_lse), (q, k, v), *upstreams)
    definition, doubles = partial(reference.block_attn, mask=mask, **options_of_lse), [x.double() for x in (q, k, v)]
    exact = with_gradients(definition, doubles, *upstreams)
    change = (upstreams[0].double() * (exact[0] - exact[0].to(q.dtype).double())).sum(-1)
    of_rounded_output = with_gradients(definition, doubles, upstreams[0], upstreams[1] + change)
    peers = [None] * 5
    if not lse_weight and "softcap" not in options:
        peers = with_gradients(partial(fused_sdpa, mask=mask, scale=options.get("scale")), (q, k, v), upstreams[0])
    rounding = torch.finfo(q.dtype).eps
    visible = mask.to_bool()
    unseen_keys, empty_rows = ~visible.any(-2), ~visible.any(-1)
    unused = empty_rows, unseen_keys, unseen_keys
    gradients = ("q", "k", "v"), ours[2:], peers[2:], exact[2:], of_rounded_output[2:], unused
    for name, got, peer, want, rounded, zero in zip(*gradients, strict=True):
        assert got.dtype == q.dtype and got.isfinite().all()
        error = distance(got, want)
        # Where PyTorch has no such kernel (large heads), its own rounds nothing but the result. The floor is what
        # rounding of the output, of the scores' gradients and of the result comes to.
        limit = 3 * rounding if peer is None else max(rounding / 2.5, 1.5 * distance(peer, want))
        limit += distance(rounded, want)
        assert error <= limit, f"{name}: {error:.3g}, limit {limit:.3g}"
        assert not got[zero.expand(got.shape[:-1])].any()


def is_same(got, want, deterministic):
    """Gradients of two runs: of equal bits, or of float32 sums in another order."""
    return torch.equal(got, want) if deterministic else distance(got, want) < 1e-2


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
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_every_ratio_of_heads(heads, kv_heads, head_dim):
    mask = MASKS["anchors"]().to("cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, heads, kv_heads, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": -0.3},
        {"scale": 0.0},
        {"softcap": 2.0},
        {"softcap": 5.0, "scale": -1.0},
        {"softcap": 50.0, "scale": 2.0},
        {"softcap": 1e6},
    ],
    ids=str,
)
def test_options(options, head_dim):
    mask = MASKS["block_causal"]().to("cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim), **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("name", ["causal", "anchors", "any int32"])
def test_gradient_of_the_lse(name, head_dim):
    mask = MASKS[name]().to("cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim), lse_weight=1.0)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_large_scores(head_dim):
    mask = MASKS["prefix_block"]().to("cuda")
    q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)
    check(mask, 10 * q, 10 * k, v)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_long_rows(head_dim):
    mask = IntervalMask.prefix_block(torch.tensor([5000, 4111], device="cuda"), 2500, max_len=5000)
    check(mask, *inputs(mask, "cuda", torch.bfloat16, heads=2, kv_heads=1, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_more_tiles_of_keys_than_blocks(head_dim):
    """On Hopper most tiles of keys then belong to one block; above head_dim 64 the heads are taken in sections."""
    mask = IntervalMask.causal(2048).to("cuda")
    check(mask, *inputs(mask, "cuda", torch.bfloat16, heads=8, kv_heads=8, head_dim=head_dim, batch=4))


def test_random_intervals():
    """Intervals in any order and place, also beyond the keys."""
    for case in range(60):
        torch.manual_seed(case)
        q_len, kv_len = torch.randint(1, 700, (2,)).tolist()
        bounds = torch.randint(-9, kv_len + 9, (4, (1, 2)[case % 2], q_len), dtype=torch.int32, device="cuda")
        mask = IntervalMask(*bounds, kv_len)
        heads, kv_heads, head_dim = [(4, 2, 64), (3, 1, 128), (16, 2, 80), (2, 2, 256), (8, 1, 320)][case % 5]
        check(mask, *inputs(mask, "cuda", HALVES[case % 2], heads, kv_heads, head_dim))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_dense_training_batch(head_dim):
    """Anchors as in training: unsorted, some dropped; a context tile is seen by nearly all blocks."""
    torch.manual_seed(1)
    where, keep = torch.randint(0, 700, (2, 96), device="cuda"), torch.rand(2, 96, device="cuda") > 0.1
    mask = IntervalMask.anchor_blocks(700, where, 16, keep=keep)
    check(mask, *inputs(mask, "cuda", torch.bfloat16, heads=8, kv_heads=2, head_dim=head_dim))


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_strides(offset):
    """Heads inside rows as a fused projection leaves them; where addresses are odd the portable kernel serves."""
    mask = MASKS["causal"]().to("cuda")
    fused = torch.randn(2, mask.q_len, 6 * 64 + 16, device="cuda", dtype=torch.bfloat16)[..., offset : offset + 6 * 64]
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in fused.split((4 * 64, 64, 64), dim=-1))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(2, 4, 64, mask.q_len, device="cuda", dtype=torch.bfloat16)
    for gradient in (upstream.mT, torch.ones((), device="cuda", dtype=torch.bfloat16).expand(2, 4, mask.q_len, 64)):
        got = torch.autograd.grad(block_attn(*leaves, mask), leaves, gradient)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        want = torch.autograd.grad(reference.block_attn(*exact, mask), exact, gradient.double())
        for a, b in zip(got, want, strict=True):
            assert distance(a, b) < 1e-2


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_what_no_row_sees_is_never_used(head_dim, deterministic):
    mask = IntervalMask.anchor_blocks(130, torch.tensor([[9, 70, 128], [4, 0, 55]]), 7, keep=torch.rand(2, 3) > 0.4)
    mask = mask.to("cuda")
    visible = mask.to_bool()
    q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)
    upstream = torch.randn_like(q)
    attend = partial(block_attn, mask=mask, deterministic=deterministic)
    clean = with_gradients(attend, (q, k, v), upstream)
    empty = ~visible.any(-1, keepdim=True)
    leaves = [x.requires_grad_() for x in (q.masked_fill(empty, math.nan), k.clone(), v.clone())]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, upstream.masked_fill(empty, math.nan))
    assert torch.equal(out, clean[0])
    assert all(is_same(got, want, deterministic) for got, want in zip(grads, clean[2:], strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("name", ["anchors", "block causal", "few keys"])
def test_deterministic_gradients_have_the_same_bits(name, head_dim):
    """Other kernels disturb the order of the blocks. Few keys have fewer tiles than there are blocks."""
    mask, batch, heads, kv_heads = {
        "anchors": lambda: (IntervalMask.anchor_blocks(700, torch.randint(0, 700, (1, 64)), 16), 1, 8, 2),
        "block causal": lambda: (IntervalMask.block_causal(1500, 16), 2, 6, 2),
        "few keys": lambda: (IntervalMask.full(100, q_len=900), 1, 8, 1),
    }[name]()
    mask = mask.to("cuda")
    q, k, v = inputs(mask, "cuda", torch.bfloat16, heads, kv_heads, head_dim, batch)
    upstream, other, side = torch.randn_like(q), torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    first = with_gradients(partial(block_attn, mask=mask), (q, k, v), upstream)[2:]
    attend = partial(block_attn, mask=mask, deterministic=True)
    want = None
    for repeat in range(20):
        with torch.cuda.stream(side):
            for _ in range(repeat % 4):
                other @ other
        got = with_gradients(attend, (q, k, v), upstream)[2:]
        want = want or got
        assert all(map(torch.equal, got, want))
    assert all(distance(a, b) < 1e-2 for a, b in zip(want, first, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
def test_two_streams(deterministic):
    """Blocks of one call wait for each other, whatever else runs on the GPU."""
    mask = IntervalMask.block_causal(1500, 16, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    attend = partial(block_attn, mask=mask, deterministic=deterministic)
    calls = [
        (*inputs(mask, "cuda", torch.bfloat16, head_dim=d), stream)
        for d, stream in zip((64, 128), streams, strict=True)
    ]
    upstreams = [torch.randn_like(q) for q, *_ in calls]
    want = [with_gradients(attend, call[:3], upstream) for call, upstream in zip(calls, upstreams, strict=True)]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for (*leaves, stream), upstream in zip(calls, upstreams, strict=True):
            with torch.cuda.stream(stream):
                got.append(with_gradients(attend, leaves, upstream))
        torch.cuda.synchronize()
        for mine, first in zip(got, want, strict=True):
            assert all(is_same(a, b, deterministic) for a, b in zip(mine[2:], first[2:], strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(shape):
    batch, q_len, kv_len = shape
    mask = IntervalMask(*torch.zeros(4, 1, q_len, dtype=torch.int32, device="cuda"), kv_len)
    leaves = [x.requires_grad_() for x in inputs(mask, "cuda", torch.bfloat16, batch=batch)]
    grads = torch.autograd.grad(block_attn(*leaves, mask).sum(), leaves)
    assert not any(grad.any() for grad in grads)


# ---------------------------------------------------------------------------------- what training puts around it


def leaves_and_mask(head_dim=64):
    mask = MASKS["block_causal"]().to("cuda").plan(4, 2, head_dim)
    return [x.requires_grad_() for x in inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)], mask


def gradients(function, leaves):
    return torch.autograd.grad(function(*leaves).float().square().sum(), leaves)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_whole(head_dim):
    leaves, mask = leaves_and_mask(head_dim)
    attend = partial(block_attn, mask=mask, deterministic=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, leaves), gradients(attend, leaves)))


def test_activation_checkpointing():
    leaves, mask = leaves_and_mask()
    attend = partial(block_attn, mask=mask, deterministic=True)
    again = partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
    assert all(map(torch.equal, gradients(again, leaves), gradients(attend, leaves)))


def test_autocast():
    leaves, mask = leaves_and_mask()
    full = [x.detach().float().requires_grad_() for x in leaves]
    attend = partial(block_attn, mask=mask, deterministic=True)
    with torch.autocast("cuda", torch.bfloat16):
        got = gradients(attend, full)
    assert all(x.dtype == torch.float32 for x in got)
    assert all(torch.equal(a, b.float()) for a, b in zip(got, gradients(attend, leaves), strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_graph_of_forward_and_backward(head_dim, deterministic):
    """One graph serves other masks of the same shape."""
    leaves, mask = leaves_and_mask(head_dim)

    def step():
        now = IntervalMask(*bounds, mask.kv_len)
        return gradients(partial(block_attn, mask=now, deterministic=deterministic), leaves)

    bounds = [mask.ctx_lo.clone(), mask.ctx_hi.clone(), mask.blk_lo.clone(), mask.blk_hi.clone()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    bounds[1].sub_(5)
    with torch.no_grad():
        leaves[0].normal_()
    graph.replay()
    assert all(is_same(a, b, deterministic) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_memory(head_dim, deterministic):
    """Beside inputs and results at most float32 sums of all gradients and two numbers a row."""
    mask = IntervalMask.prefix_block(2048, 1024, device="cuda")
    leaves = [x.requires_grad_() for x in inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)]
    out, lse = block_attn(*leaves, mask, deterministic=deterministic, return_lse=True)
    upstream = torch.randn_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, leaves, upstream)
    needed = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    tables = 1 << 20  # of tiles and turns
    assert needed <= 4 * sum(x.numel() for x in leaves) + 2 * lse.nbytes + tables


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_call_without_a_plan_makes_it_once(is_planned):
    """The backward writes its own table of tiles along with the first values that it computes."""
    leaves, mask = leaves_and_mask()
    mask = mask if is_planned else IntervalMask(mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi, mask.kv_len)
    gradients(partial(block_attn, mask=mask), leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(partial(block_attn, mask=mask), leaves)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events()]
    assert any("block_attn_backward" in name for name in kernels)
    assert sum("block_attn_plan" in name for name in kernels) == (0 if is_planned else 1)


def test_opcheck():
    leaves, mask = leaves_and_mask()
    q, k, v = (x.detach() for x in leaves)
    bounds = mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi
    out, lse = block_attn(q, k, v, mask, return_lse=True)
    saved = (torch.randn_like(out), torch.randn_like(lse), q, k, v, *bounds, out, lse, 0.1, None, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dflash_ext.block_attn_backward, saved, test_utils=tests)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_portable_kernels_take_at_most_99_kb(head_dim, deterministic, tmp_path):
    """Blocks of compute capability 8.6 and 8.9 have no more shared memory. The profiler says what each launch took."""
    mask = MASKS["block_causal"]().to("cuda")
    q, k, v = inputs(mask, "cuda", torch.bfloat16, head_dim=head_dim)
    leaves = [x.requires_grad_() for x in (F.pad(q, (1, 0))[..., 1:], k, v)]  # only the portable kernels take these
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(partial(block_attn, mask=mask, deterministic=deterministic), leaves)
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    taken = {x["name"]: x["args"]["shared memory"] for x in events if "block_attn" in x["name"] and "grid" in x["args"]}
    assert len(taken) == 5 and all("_sm80" in name for name in taken)  # the plan, the forward, three of the backward
    assert 32 << 10 <= max(taken.values()) <= 99 << 10


def test_portable_kernel():
    """The same tests as on a GPU that is not Hopper."""
    if os.environ.get("DFLASH_EXT_GPU"):
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not compiles"],
        env=os.environ | {"DFLASH_EXT_GPU": "portable"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
