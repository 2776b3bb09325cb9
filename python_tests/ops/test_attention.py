"""block_attn and block_attn_decode against their definition in float64 and against PyTorch's attention."""

import contextlib
import gc
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import IntervalMask, block_attn, block_attn_decode, reference
from python_tests.exactness import DEFINITION, allowed_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def some_empty_rows(device):
    keep = torch.tensor([[True, False], [True, True]], device=device)
    return IntervalMask.anchor_blocks(11, torch.tensor([[9, 2], [4, 0]], device=device), 4, keep=keep)


def anchors(context_len, count, block_size, batch=2, **options):
    """Blocks at random places, in no order, a third of them dropped."""
    where = torch.randint(0, context_len, (batch, count))
    keep = torch.rand(batch, count) > 0.3
    return IntervalMask.anchor_blocks(context_len, where, block_size, keep=keep, **options)


def from_dense():
    visible = torch.zeros(2, 1, 70, 150, dtype=torch.bool)
    for b in range(2):
        for row, (a, c) in enumerate(torch.randint(0, 150, (70, 2)).tolist()):
            visible[b, 0, row, a : a + 30] = True
            visible[b, 0, row, c : c + 9] = True
    return IntervalMask.from_dense(visible)


def any_int32():
    """Bounds up to the ends of int32, in all combinations."""
    ends = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 45, 70, 2**31 - 1], dtype=torch.int32)
    return IntervalMask(*ends[torch.randint(len(ends), (4, 2, 77), generator=torch.Generator().manual_seed(0))], 70)


MASKS = {
    "full": lambda: IntervalMask.full(torch.tensor([101, 3]), q_len=37, kv_len=130),
    "causal": lambda: IntervalMask.causal(torch.tensor([133, 70]), max_len=133),
    "sliding_window": lambda: IntervalMask.sliding_window(torch.tensor([201, 64]), 17, max_len=201),
    "prefix_lm": lambda: IntervalMask.prefix_lm(90, torch.tensor([41, 0])),
    "prefix_block": lambda: IntervalMask.prefix_block(203, torch.tensor([70, 131]), max_len=203),
    "block_causal": lambda: IntervalMask.block_causal(150, 13, torch.tensor([20, 3])),
    "block_diffusion": lambda: IntervalMask.block_diffusion(torch.tensor([75, 40]), 16, max_len=80),
    "anchors": lambda: anchors(99, 11, 7),
    "anchors, window": lambda: anchors(99, 11, 7, window=20),
    "anchors, other window": lambda: anchors(99, 11, 7, window=20, convention="speculators"),
    "anchors and context": lambda: anchors(99, 5, 7, include_context=True),
    "packed": lambda: IntervalMask.packed([0, 40, 41, 130], IntervalMask.causal, total_len=140),
    "decode": lambda: IntervalMask.decode(torch.tensor([90, 7]), 9, kv_len=110, causal=True, window=33),
    "verify and draft": lambda: IntervalMask.verify_and_draft(torch.tensor([90, 7]), 5, 4, kv_len=115, window=33),
    "from_padding": lambda: IntervalMask.from_padding(torch.arange(131).sub(torch.tensor([[60], [0]])) % 131 < 71),
    "from_position_ids": lambda: IntervalMask.from_position_ids(torch.stack([torch.arange(131) % n for n in (40, 77)])),
    "from_dense": from_dense,
    "any int32": any_int32,
}


def inputs(mask, device="cpu", dtype=torch.float32, heads=4, kv_heads=2, head_dim=16, batch=2):
    shapes = [(batch, heads, mask.q_len, head_dim)] + [(batch, kv_heads, mask.kv_len, head_dim)] * 2
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def with_gradients(function, tensors, upstream, upstream_lse=None):
    """The function's output, LSE (or None) and gradients of the tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves) if upstream_lse is not None else (function(*leaves), None)
    loss = (out * upstream.to(out.dtype)).sum()
    if lse is not None:
        # Empty rows have an LSE of -inf; what arrives from above must not make their gradient NaN.
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * upstream_lse.to(lse.dtype)).sum()
    return out.detach(), None if lse is None else lse.detach(), *torch.autograd.grad(loss, leaves)


def sdpa(q, k, v, mask, scale=None):
    """PyTorch's attention with the dense mask; its empty rows attend to everything and are overwritten."""
    visible = mask.to_bool()
    empty = ~visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible | empty, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.masked_fill(empty, 0.0)


def distance(got, want):
    """Root mean square, relative to that of what is wanted."""
    return ((got.double() - want).square().mean() / want.square().mean().clamp(min=1e-30)).sqrt().item()


def check_as_exact_as_torch(mask, q, k, v):
    upstream = torch.randn(q.shape)
    exact = with_gradients(partial(reference.block_attn, mask=mask), [x.double() for x in (q, k, v)], upstream)
    ours = with_gradients(partial(block_attn, mask=mask), (q, k, v), upstream)
    torchs = with_gradients(partial(sdpa, mask=mask), (q, k, v), upstream)
    rounding = torch.finfo(q.dtype).eps / 4
    for name, got, peer, want in zip(("out", "", "q", "k", "v"), ours, torchs, exact, strict=True):
        if name:
            assert got.dtype == q.dtype
            error, torchs_error = distance(got, want), distance(peer, want)
            limit = allowed_error(torchs_error, rounding)
            assert error <= limit, f"{name}: {error:.3g}, torch's own {torchs_error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_is_as_exact_as_torch(mask, dtype):
    mask = mask()
    check_as_exact_as_torch(mask, *inputs(mask, dtype=dtype))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_float64_is_a_few_roundings_from_the_definition(mask):
    """The bound of the test above on a processor where PyTorch's own op is exact."""
    mask = mask()
    data = inputs(mask, dtype=torch.float64)
    upstream = torch.randn(data[0].shape)
    exact = with_gradients(partial(reference.block_attn, mask=mask), data, upstream)
    ours = with_gradients(partial(block_attn, mask=mask), data, upstream)
    for got, want in zip(ours, exact, strict=True):
        assert got is None or distance(got, want) <= DEFINITION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256, 512])
def test_every_head_dim(head_dim, dtype):
    mask = IntervalMask.prefix_block(77, 31)
    check_as_exact_as_torch(mask, *inputs(mask, dtype=dtype, head_dim=head_dim, batch=1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1), (8, 8)])
def test_every_ratio_of_heads(heads, kv_heads):
    mask = MASKS["anchors"]()
    check_as_exact_as_torch(mask, *inputs(mask, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_narrower_than_keys(device, dtype, softcap):
    """Multi-head latent attention, as DeepSeek's: gradients and the LSE, too."""
    mask = MASKS["prefix_block"]().to(device)
    q, k, v = (torch.randn(2, heads, 203, width, dtype=dtype) for heads, width in ((4, 24), (2, 24), (2, 16)))
    q, k, v = (x.to(device).requires_grad_() for x in (q, k, v))
    got = block_attn(q, k, v, mask, softcap=softcap, return_lse=True)
    want = reference.block_attn(*(x.double() for x in (q, k, v)), mask, softcap=softcap, return_lse=True)
    grads = [torch.autograd.grad(out.double().cos().sum() + lse.sum(), (q, k, v)) for out, lse in (got, want)]
    for ours, exact in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        assert ours.shape == exact.shape
        error = (ours.double() - exact.double()).abs().max() / exact.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("rows", "keys", "head_dim"), [(1, 512, 256), (4, 100, 512), (7, 64, 256)])
def test_few_rows(rows, keys, head_dim):
    mask = IntervalMask.full(keys, q_len=rows)
    q, k, v = inputs(mask, dtype=torch.float32, head_dim=head_dim, batch=8)
    exact = reference.block_attn(q.double(), k.double(), v.double(), mask)
    limit = allowed_error(distance(sdpa(q, k, v, mask), exact), torch.finfo(q.dtype).eps / 4)
    assert distance(block_attn(q, k, v, mask), exact) <= limit


def test_long_rows():
    mask = IntervalMask.full(5000, q_len=40)
    check_as_exact_as_torch(mask, *inputs(mask, heads=2, batch=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores(dtype):
    mask = MASKS["block_causal"]()
    q, k, v = inputs(mask, dtype=dtype)
    check_as_exact_as_torch(mask, 10 * q, 10 * k, v)
    q, k = 1000 * q, 10 * k  # scores of 1e4 and more: nearly all of a row's weight is on one key
    want = reference.block_attn(q.double(), k.double(), v.double(), mask)
    assert distance(block_attn(q, k, v, mask), want) < {torch.float32: 1e-3, torch.bfloat16: 5e-3}[dtype]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_output_lse_and_gradients(device, dtype, tolerance, softcap):
    mask = some_empty_rows(device)
    tensors = inputs(mask, device, dtype)
    upstreams = torch.randn_like(tensors[0]), torch.randn(2, 4, mask.q_len, device=device)
    options = {"softcap": softcap, "scale": -0.7, "return_lse": True}
    ours = with_gradients(partial(block_attn, mask=mask, **options), tensors, *upstreams)
    exact = with_gradients(
        partial(reference.block_attn, mask=mask, **options), [x.double() for x in tensors], *upstreams
    )
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    empty = ~mask.to_bool().any(-1).expand(-1, 4, -1)
    out, lse, grad_q = ours[:3]
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert empty.any() and (out[empty] == 0).all() and (grad_q[empty] == 0).all()
    assert torch.equal(lse == -math.inf, empty)


def test_lse_alone_has_a_gradient():
    mask = MASKS["causal"]()
    q, k, v = (x.requires_grad_() for x in inputs(mask, dtype=torch.float64))
    grads = [
        torch.autograd.grad(function(q, k, v, mask, return_lse=True)[1][0].sum(), (q, k), allow_unused=True)
        for function in (block_attn, reference.block_attn)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap):
    mask = some_empty_rows("cpu")
    tensors = [x.requires_grad_() for x in inputs(mask, dtype=torch.float64, heads=2, kv_heads=1, head_dim=8)]
    empty = ~mask.to_bool().any(-1).expand(-1, 2, -1)

    def attend(q, k, v):
        out, lse = block_attn(q, k, v, mask, softcap=softcap, return_lse=True)
        return out, lse.masked_fill(empty, 0.0)

    assert torch.autograd.gradcheck(attend, tensors)


def random_case():
    """Intervals in any order and place, also beyond the keys, with any shapes, strides, dtype and options."""

    def pick(*choices):
        return choices[torch.randint(len(choices), ()).item()]

    batch, kv_heads, group = pick(1, 2), pick(1, 2), pick(1, 2, 3, 8)
    q_len, kv_len = (torch.randint(1, 200, ()).item() for _ in range(2))
    bounds = torch.randint(-9, kv_len + 9, (4, pick(1, batch), q_len), dtype=torch.int32)
    mask = IntervalMask(*bounds, kv_len)
    dtype, head_dim, pad = pick(*DTYPES), 8 * torch.randint(1, 10, ()).item(), pick(0, 1, 3)
    tensors = []
    for heads, length in ((kv_heads * group, q_len), (kv_heads, kv_len), (kv_heads, kv_len)):
        shape = pick((batch, heads, length), (batch, length, heads), (heads, batch, length))
        x = torch.randn(*shape, head_dim + pad).to(dtype)[..., :head_dim]
        if shape[:2] == (batch, length) and shape != (batch, heads, length):
            x = x.transpose(1, 2)
        elif shape[0] == heads and shape != (batch, heads, length):
            x = x.transpose(0, 1)
        tensors.append(x)
    return mask, tensors, {"softcap": pick(None, 1.0), "scale": pick(None, 0.3)}


def check_random_cases(count):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
    for case in range(count):
        torch.manual_seed(case)
        mask, tensors, options = random_case()
        upstreams = torch.randn(tensors[0].shape), torch.randn(tensors[0].shape[:-1])
        options["return_lse"] = True
        ours = with_gradients(partial(block_attn, mask=mask, **options), tensors, *upstreams)
        exact = with_gradients(
            partial(reference.block_attn, mask=mask, **options), [x.double() for x in tensors], *upstreams
        )
        limit = tolerance[tensors[0].dtype]
        for got, want in zip(ours, exact, strict=True):
            top = want[want.isfinite()].abs().max().clamp(min=1) if want.isfinite().any() else 1
            message = f"case {case}: {tensors[0].dtype} {[list(x.shape) for x in tensors]} {options}"
            torch.testing.assert_close(
                got.double(), want, atol=limit * top, rtol=0, msg=lambda m, s=message: f"{s}\n{m}"
            )


def test_random_cases():
    check_random_cases(60)


@pytest.mark.slow
def test_many_random_cases():
    check_random_cases(2000)


def test_layouts_are_kept_and_not_copied():
    mask = IntervalMask.block_causal(70, 16)
    fused = torch.randn(2, 70, 6, 24, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in fused.split((4, 1, 1), dim=2))
    out = block_attn(q, k, v, mask)
    assert out.transpose(1, 2).is_contiguous()
    want = reference.block_attn(q, k, v, mask)
    torch.testing.assert_close(out, want)
    for upstream in (torch.randn_like(out), torch.ones(()).expand_as(out), torch.randn(2, 4, 24, 70).mT):
        grads = [torch.autograd.grad(x, fused, upstream, retain_graph=True)[0] for x in (out, want)]
        torch.testing.assert_close(*grads)


def test_what_no_row_sees_is_never_used():
    mask = anchors(130, 9, 7, context_start=torch.full((2, 9), 3))
    visible = mask.to_bool()
    q, k, v = inputs(mask)
    upstream = torch.randn_like(q)
    clean = with_gradients(partial(block_attn, mask=mask), (q, k, v), upstream)
    empty = ~visible.any(-1, keepdim=True)
    unseen = ~visible.any(-2)[..., None]
    assert empty.any() and unseen.any()
    dirty = [q.masked_fill(empty, math.nan), *(x.masked_fill(unseen, math.nan) for x in (k, v))]
    leaves = [x.requires_grad_() for x in dirty]
    out = block_attn(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, upstream.masked_fill(empty, math.nan))
    assert torch.equal(out, clean[0])
    assert all(torch.equal(got, want) for got, want in zip(grads, clean[2:], strict=True))


def test_not_a_number_is_not_hidden():
    mask = IntervalMask.causal(40)
    q, k, v = inputs(mask)
    q[0, 1, 5], q[1, 3, 7, 0] = math.nan, math.inf
    out, lse = block_attn(q, k, v, mask, return_lse=True)
    rows = torch.zeros(2, 4, 40, dtype=torch.bool)
    rows[0, 1, 5] = rows[1, 3, 7] = True
    assert torch.equal(out.isnan().all(-1), rows) and not out[~rows].isnan().any()
    assert lse[0, 1, 5].isnan()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(shape):
    batch, q_len, kv_len = shape
    mask = IntervalMask(*torch.zeros(4, 1, q_len, dtype=torch.int32), kv_len)
    q, k, v = (x.requires_grad_() for x in inputs(mask, batch=batch))
    out = block_attn(q, k, v, mask)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and not out.any() and not any(grad.any() for grad in grads)


def test_threads_do_not_change_the_result():
    mask = IntervalMask.prefix_block(300, 130)
    tensors = inputs(mask, heads=2, kv_heads=1, batch=1)
    upstream = torch.randn_like(tensors[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(partial(block_attn, mask=mask), tensors, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True) if a is not None)


def test_autocast_casts_instead_of_refusing(device):
    mask = IntervalMask.causal(6, device=device)
    q, k, v = inputs(mask, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = block_attn(q, k, v.bfloat16(), mask)
        decoded = block_attn_decode(q, k, v.bfloat16(), mask)
        wide = block_attn(q.double(), k.double(), v.double(), mask)
    assert out.dtype == torch.bfloat16 == decoded.dtype and wide.dtype == torch.float64
    want = block_attn(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert torch.equal(out, want)


@pytest.mark.parametrize("op", [block_attn, block_attn_decode])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_autocast_casts_nothing_but_floats(op, dtype):
    mask = IntervalMask.causal(6)
    q, k, v = inputs(mask, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=f"{op.__name__}: q is {dtype}"):
        op(q.to(dtype), k, v, mask)


def test_registrations():
    mask = some_empty_rows("cpu")
    bounds = (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi)
    q, k, v = inputs(mask)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    ops, scaling = torch.ops.dflash_ext, (0.25, 3.0)
    out, lse = ops.block_attn(q, k, v, *bounds, mask.kv_len, None, *scaling, False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.block_attn, (*leaves, *bounds, mask.kv_len, None, *scaling, False))
    saved = (q, k, v, *bounds, out, lse, *scaling, False)
    torch.library.opcheck(ops.block_attn_backward, (torch.randn_like(out), None, *saved))
    torch.library.opcheck(ops.block_attn_backward, (torch.randn_like(out), torch.randn_like(lse), *saved))
    torch.library.opcheck(ops.block_attn_decode, (q, k, v, *bounds, mask.kv_len, None, None, False, False, *scaling))


@pytest.mark.parametrize("function", [block_attn, block_attn_decode])
def test_compiles_once_for_all_lengths(function):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for length in (9, 17, 130):
        mask = IntervalMask.prefix_block(torch.tensor([length, length - 1]), 3, max_len=length)
        q, k, v = inputs(mask)
        assert torch.equal(compiled(q, k, v, mask), function(q, k, v, mask))
    assert len(graphs) == 1


def test_gradients_of_the_compiled_function():
    mask = some_empty_rows("cpu")
    tensors = inputs(mask)
    upstreams = torch.randn_like(tensors[0]), torch.randn(2, 4, mask.q_len)
    compiled = torch.compile(block_attn, fullgraph=True, backend="aot_eager")
    got, want = (
        with_gradients(partial(f, mask=mask, return_lse=True), tensors, *upstreams) for f in (compiled, block_attn)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def paged(caches, page_size, capacity):
    """The caches [B, Hkv, S, D] in pages at random places, and the table; the rest of the pages is NaN."""
    batch, kv_heads, length, dim = caches[0].shape
    per_row = capacity // page_size
    table = torch.randperm(batch * per_row + 3)[: batch * per_row].view(batch, per_row).int()
    result = []
    for cache in caches:
        pages = cache.new_full((batch * per_row + 3, page_size, kv_heads, dim), math.nan)
        padded = F.pad(cache, (0, 0, 0, capacity - length), value=math.nan)
        cut = padded.transpose(1, 2).reshape(batch * per_row, page_size, kv_heads, dim)
        pages[table.flatten().long()] = cut
        result.append(pages)
    return *result, table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 50}], ids=str)
def test_decode_against_caches_of_any_length(dtype, options):
    lens, starts = torch.tensor([3, 1500, 2070]), torch.tensor([0, 1100, 2])
    mask = IntervalMask.decode(lens, 5, kv_len=2100, kv_start=starts, **options)
    q, k, v = inputs(mask, dtype=dtype, batch=3)
    want = reference.block_attn(*(x.double() for x in (q, k, v)), mask, softcap=30.0, scale=0.3)
    at = torch.arange(2100)
    hidden = (at < starts[:, None]) | (at >= lens[:, None] + 5)
    k, v = (x.masked_fill(hidden[:, None, :, None], math.nan) for x in (k, v))
    got = block_attn_decode(q, k, v, mask, softcap=30.0, scale=0.3)
    assert distance(got, want) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 5e-3)

    pages_k, pages_v, table = paged((k, v), 12, 2112)
    table[0, 1:] = -1
    decoded = block_attn_decode(q, pages_k, pages_v, mask, block_table=table, softcap=30.0, scale=0.3)
    assert torch.equal(decoded, got)
    table[1, 1500 // 12] = 10_000
    with pytest.raises(RuntimeError, match=r"block_table is not one of the \d+ pages"):
        block_attn_decode(q, pages_k, pages_v, mask, block_table=table)


def test_decode_gives_a_row_the_same_bits_in_any_company():
    lens = torch.tensor([1300, 40])
    mask = IntervalMask.decode(lens, 3, kv_len=1400)
    q, k, v = inputs(mask)
    both = block_attn_decode(q, k, v, mask)
    for b, kv_len in ((0, 1310), (0, 1400), (1, 44), (1, 1025)):
        alone = IntervalMask.decode(lens[b : b + 1], 3, kv_len=kv_len)
        one = [x[b : b + 1] for x in (q, k[:, :, :kv_len], v[:, :, :kv_len])]
        assert torch.equal(block_attn_decode(*one, alone)[0], both[b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(dtype, bad):
    mask = IntervalMask.decode(torch.tensor([170, 20]), 30, kv_len=200, causal=True)
    q, k, v = inputs(mask, dtype=dtype)
    clean = block_attn_decode(q, k, v, mask)
    v[0, 1, 180, 3], v[1, 0, 20, 5], v[1, 0, 49, 6] = bad, bad, bad  # seen from row 10, 0 and 29 on
    got = block_attn_decode(q, k, v, mask)
    spoiled = torch.zeros_like(got, dtype=torch.bool)
    spoiled[0, 2:, 10:, 3] = spoiled[1, :2, :, 5] = spoiled[1, :2, 29:, 6] = True
    assert torch.equal(~got.isfinite(), spoiled)
    assert torch.equal(got[~spoiled], clean[~spoiled])


def test_decode_takes_pages_and_a_mask_shorter_than_the_cache(device):
    mask = IntervalMask.decode(torch.tensor([3, 7], device=device), 2, kv_len=9, causal=True)
    q, _, _ = inputs(mask, device, torch.float32)
    k, v = torch.randn(2, 2, 2, 12, 16, device=device)
    want = block_attn(q, k[:, :, :9].contiguous(), v[:, :, :9].contiguous(), mask)
    torch.testing.assert_close(block_attn_decode(q, k, v, mask), want)
    table = torch.tensor([[5, 0, 2], [1, 3, 4]], dtype=torch.int32, device=device)
    pages = torch.empty(2, 6, 4, 2, 16, device=device)
    pages[:, table.flatten().long()] = torch.stack((k, v)).transpose(2, 3).reshape(2, 6, 4, 2, 16)
    torch.testing.assert_close(block_attn_decode(q, *pages, mask, block_table=table), want)
    assert not block_attn_decode(q.requires_grad_(), k, v, mask).requires_grad


@pytest.mark.parametrize("page_size", [None, 4])
def test_decode_reads_nothing_beyond_the_masks_keys(page_size):
    bounds = torch.tensor([[[0, 5]], [[3, 99]], [[7, 8]], [[12, 99]]], dtype=torch.int32)
    mask = IntervalMask(*bounds, 9)
    q, _, _ = inputs(mask, batch=1)
    k, v = torch.randn(2, 1, 2, 12, 16)
    want = block_attn(q, k[:, :, :9], v[:, :, :9], mask)
    k[:, :, 9:] = v[:, :, 9:] = math.nan
    k, v, table = (k, v, None) if page_size is None else paged((k, v), page_size, 12)
    torch.testing.assert_close(block_attn_decode(q, k, v, mask, block_table=table), want)
    if page_size:
        wide = torch.stack((table, table), -1).flatten(1)
        torch.testing.assert_close(block_attn_decode(q, k, v, mask, block_table=wide[:, ::2]), want)


def test_meta_tensors_give_meta_tensors():
    mask = IntervalMask.prefix_block(9, 3, device="meta")
    q, k, v = (x.to("meta").requires_grad_() for x in inputs(mask, dtype=torch.bfloat16))
    out, lse = block_attn(q, k, v, mask, return_lse=True)
    assert out.is_meta and out.shape == q.shape and out.dtype == q.dtype
    assert lse.is_meta and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(grad.is_meta and grad.shape == x.shape for grad, x in zip(grads, (q, k, v), strict=True))
    decoded = block_attn_decode(q, k, v, mask)
    assert decoded.is_meta and decoded.shape == q.shape


def reject(message, q=(1, 2, 3, 8), k=(1, 2, 3, 8), v=None, dtype=torch.float32, mask=None, op=block_attn, **kw):
    q, k, v = torch.zeros(q), torch.zeros(k, dtype=dtype), torch.zeros(v or k, dtype=dtype)
    with pytest.raises(ValueError, match=message) as caught:
        op(q, k, v, IntervalMask.causal(3) if mask is None else mask, **kw)
    assert "\n" not in str(caught.value)


def test_refusals_name_the_value():
    reject("not four dimensions each", q=(1, 3, 8))
    reject("do not fit", k=(1, 2, 3, 16))
    reject("do not fit", k=(2, 2, 3, 8))
    reject("do not fit", v=(1, 2, 4, 8))
    reject("3 query heads are no multiple of 2", q=(1, 3, 3, 8))
    reject("head_dim is 12", q=(1, 2, 3, 12), k=(1, 2, 3, 12))
    reject("head_dim is 520", q=(1, 2, 3, 520), k=(1, 2, 3, 520))
    reject("torch.float16", dtype=torch.float16)
    reject("softcap is 0", softcap=0.0)
    reject("batch 1 and 4 rows", mask=IntervalMask.causal(4))
    reject("batch 2", mask=IntervalMask.causal(torch.tensor([1, 2]), max_len=3))
    reject("over 5 keys, k has 3", mask=IntervalMask.full(5, q_len=3))
    reject("0 key heads", k=(1, 0, 3, 8))
    reject("not four dimensions each", q=(1, 3, 8), op=block_attn_decode)
    reject("the cache has 3", mask=IntervalMask.full(5, q_len=3), op=block_attn_decode)
    reject("pages need a block_table", k=(4, 3, 2, 8), op=block_attn_decode)
    table = torch.zeros(2, 1, dtype=torch.int32)
    reject(r"int32 \[1, max_pages\]", k=(4, 3, 2, 8), op=block_attn_decode, block_table=table)
    reject(
        "mask is over 4 keys, the cache has 3",
        k=(4, 3, 2, 8),
        op=block_attn_decode,
        block_table=table[:1],
        mask=IntervalMask.full(4, q_len=3),
    )
    reject(
        r"the mask is for batch 1 and 6 rows, q has 1 and 2; q \[B, Hq, Lq, D\] and k, v \[B, Hkv, Lk, D\] are needed",
        q=(1, 6, 2, 8),
        k=(1, 6, 2, 8),
        mask=IntervalMask.causal(6),
    )
    reject(
        r"4 query heads are no multiple of 9 key heads; .* \[B, Hkv, S, D\]",
        (1, 4, 3, 8),
        (1, 9, 2, 8),
        op=block_attn_decode,
    )
    paged = {"op": block_attn_decode, "mask": IntervalMask.full(8, q_len=3), "block_table": table[:1].expand(1, 2)}
    reject(r"no multiple of 4 key heads; .* \[pages, page_size, Hkv, D\]", (1, 2, 3, 8), (9, 2, 4, 8), **paged)
    reject(r"has 4: k_cache \[9, 2, 4, 8\] is read as \[pages, page_size", (1, 8, 3, 8), (9, 2, 4, 8), **paged)
    q = torch.zeros(1, 2, 8, 3).mT
    with pytest.raises(ValueError, match="last dimension of q has stride 3"):
        block_attn(q, q, q, IntervalMask.causal(3))


@pytest.mark.parametrize("op", [block_attn, block_attn_decode])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: [[1.0]]}, r"q is \[\[1.0\]\] \(list\); a tensor"),
        ({1: torch.zeros(1, 2, 3, 8).numpy()}, "(k|k_cache) is of type ndarray; a tensor"),
        ({2: None}, "(v|v_cache) is None; a tensor"),
        ({"softcap": "30"}, r"softcap is '30' \(str\); a number or None"),
        ({"scale": torch.ones(1)}, r"scale is torch.float32 \[1\]; a number or None"),
    ],
)
def test_refuses_what_is_no_tensor_or_number(op, change, message):
    given = {i: torch.zeros(1, 2, 3, 8) for i in range(3)} | {3: IntervalMask.causal(3)} | change
    options = {name: given.pop(name) for name in list(given) if isinstance(name, str)}
    with pytest.raises(TypeError, match=f"^{op.__name__}: {message}"):
        op(*given.values(), **options)


@pytest.mark.parametrize("op", [block_attn, block_attn_decode])
def test_refuses_a_mask_of_another_type_and_several_devices(op):
    x = torch.zeros(1, 2, 3, 8)
    for mask, what in ((None, "None"), (torch.ones(3, 3, dtype=torch.bool), r"torch.bool \[3, 3\]")):
        with pytest.raises(TypeError, match=f"{op.__name__}: mask is {what}; an IntervalMask is needed"):
            op(x, x, x, mask)
    mask, meta = IntervalMask.causal(3), x.to("meta")
    where = "q is on {}, {} on {}; one device is needed"
    name = "k" if op is block_attn else "k_cache"
    for tensors, device, other in (((x, meta, x), "cpu", name), ((meta, meta, meta), "meta", "mask")):
        with pytest.raises(ValueError, match=where.format(device, other, {"cpu": "meta", "meta": "cpu"}[device])):
            op(*tensors, mask)
    if op is block_attn_decode:
        table = torch.zeros(1, 1, dtype=torch.int32, device="meta")
        with pytest.raises(ValueError, match=where.format("cpu", "block_table", "meta")):
            op(x, x, x, mask, block_table=table)


@pytest.mark.parametrize(("softcap", "error"), [(-1.0, ValueError), (None, RuntimeError)])
def test_a_failed_call_keeps_no_tensor_alive(softcap, error):
    """Who catches an error, such as one of too little memory, has the memory of the tensors back at once."""
    q, mask, no_page = torch.zeros(1, 1, 3, 8), IntervalMask.causal(3), torch.full((1, 1), 7, dtype=torch.int32)
    alive = weakref.ref(q)
    gc.disable()
    try:
        with contextlib.suppress(error):
            block_attn_decode(q, *torch.zeros(2, 2, 3, 1, 8), mask, block_table=no_page, softcap=softcap)
            pytest.fail("nothing was raised")
        del q
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("op", [block_attn, block_attn_decode])
def test_refuses_what_does_not_fit_in_a_compiled_function(op):
    q, k, mask = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8), IntervalMask.full(5, q_len=3)
    with pytest.raises(Exception, match=f"{op.__name__}: the mask is over 5 keys, .* 4"):
        torch.compile(op, fullgraph=True, dynamic=False, backend="eager")(q, k, k, mask)


def test_the_operators_refuse_on_their_own():
    """What Python does not look at before a call. Memory errors would follow."""
    q, mask = torch.zeros(1, 2, 3, 8), IntervalMask.causal(3)
    bounds = mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi
    ops = torch.ops.dflash_ext

    def attend(q=q, k=q, v=q, bounds=bounds, kv_len=3, scale=None, softcap=None):
        ops.block_attn(q, k, v, *bounds, kv_len, None, scale, softcap, False)

    def decode(q=q, k=q, v=q, bounds=bounds, kv_len=3, table=None, scale=None, softcap=None):
        ops.block_attn_decode(q, k, v, *bounds, kv_len, table, None, False, False, scale, softcap)

    attend(), decode()
    for call in (attend, decode):
        for wrong in (
            {"q": q[0]},
            {"k": q.half()},
            {"v": None},
            {"v": torch.zeros(1, 2, 2, 8)},
            {"k": torch.zeros(1, 3, 3, 8), "v": torch.zeros(1, 3, 3, 8)},
            {"q": torch.zeros(1, 2, 8, 3).mT},
            {"q": torch.zeros(2, 2, 3, 8)},
            {"bounds": tuple(bound.long() for bound in bounds)},
            {"bounds": tuple(bound[:, :2] for bound in bounds)},
            {"bounds": tuple(bound.repeat(2, 1) for bound in bounds)},
            {"bounds": (*bounds[:3], bounds[3].repeat(1, 2)[:, ::2])},
            {"kv_len": 4},
            {"scale": math.nan},
            {"softcap": 0.0},
            {"softcap": math.inf},
        ):
            with pytest.raises(RuntimeError, match="block_attn"):
                call(**wrong)
    for table in (torch.zeros(1, 4).int()[:, ::2], torch.zeros(1, 1), torch.zeros(2, 1).int(), torch.zeros(1).int()):
        with pytest.raises(RuntimeError, match="block_table must be contiguous int32"):
            decode(k=torch.zeros(4, 3, 2, 8), v=torch.zeros(4, 3, 2, 8), table=table)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [block_attn, block_attn_decode])
def test_one_device_on_a_gpu(op):
    mask, x = IntervalMask.causal(3), torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    q, on_gpu = x.cuda(), mask.to("cuda")
    for tensors, given, message in (
        ((q, x, q), on_gpu, "q is on cuda:0, k.* on cpu"),
        ((q, q, x), on_gpu, "q is on cuda:0, v.* on cpu"),
        ((x, q, q), on_gpu, "q is on cpu, k.* on cuda:0"),
        ((q, q, q), mask, "q is on cuda:0, mask on cpu"),
        ((x, x, x), on_gpu, "q is on cpu, mask on cuda:0"),
    ):
        with pytest.raises(ValueError, match=f"{op.__name__}: {message}"):
            op(*tensors, given)


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in inputs(IntervalMask.causal(4)))
    (grad,) = torch.autograd.grad(block_attn(q, k, v, IntervalMask.causal(4)).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="block_attn: its gradient has no derivative"):
        grad.sum().backward()


def test_forward_mode_is_refused():
    q, k, v = inputs(IntervalMask.causal(4))
    with pytest.raises(RuntimeError, match="block_attn: forward-mode derivatives are not supported"):
        torch.func.jvp(lambda x: block_attn(x, k, v, IntervalMask.causal(4)), (q,), (q,))
