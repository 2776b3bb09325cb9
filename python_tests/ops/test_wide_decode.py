"""Decode attention in two parts of the context equals that in one."""

import pytest
import torch

from dflash_ext import IntervalMask, block_attn, block_attn_decode, reference
from dflash_ext.ops.wide_decode import in_two_parts

ROWS, DIM, CAPACITY = 70, 264, 256


def inputs(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, ROWS, DIM), (3, 2, CAPACITY, DIM), (3, 2, CAPACITY, DIM)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def mask(device, **options):
    """Rows behind a long, a short and no context; one row of the batch is shorter than the others."""
    lens, counts = torch.tensor([150, 1, 0], device=device), torch.tensor([ROWS, ROWS, 5], device=device)
    return IntervalMask.decode(lens, ROWS, q_lens=counts, kv_len=CAPACITY, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 40, "causal": True}, {"kv_start": 100}], ids=str)
def test_the_parts_make_the_whole(options):
    q, k, v = inputs("cpu")
    seen = mask("cpu", **options)
    got = in_two_parts(block_attn, q, k, v, seen, scale=0.3, softcap=4.0)
    want = block_attn_decode(q, k, v, seen, scale=0.3, softcap=4.0)
    torch.testing.assert_close(got, want)
    assert not got[2, :, 5:].any()


def test_intervals_in_any_place():
    """They also overlap, end before they begin, and lie beyond the keys."""
    q, k, v = inputs("cpu")
    for case in range(20):
        generator = torch.Generator().manual_seed(case)
        bounds = torch.randint(-50, CAPACITY + 50, (4, 3, ROWS), dtype=torch.int32, generator=generator)
        bounds[:, 0, ::7] = torch.tensor([-(2**31), 2**31 - 1, 2**31 - 1, -(2**31)], dtype=torch.int32)[:, None]
        seen = IntervalMask(*bounds, CAPACITY)
        torch.testing.assert_close(in_two_parts(block_attn, q, k, v, seen), block_attn_decode(q, k, v, seen))


def multiplies_all(q, k, v, mask, *, scale, softcap, return_lse):
    """An attention that hides scores, and multiplies the values of hidden keys by 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask.to_bool(), -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().nan_to_num(0.0) @ v, lse


@pytest.mark.parametrize("entries", [1, 3])
def test_keys_that_no_row_sees_may_be_nan(entries):
    q, k, v = inputs("cpu")
    bounds = torch.tensor([3, 40, 90, 95], dtype=torch.int32)[:, None, None].repeat(1, entries, ROWS)
    bounds[:, 0, 5] = torch.tensor([200, 230, 150, 30])
    seen = IntervalMask(*bounds, CAPACITY)
    dirty = [x.masked_fill(~seen.to_bool().any(-2)[..., None], torch.nan) for x in (k, v)]
    torch.testing.assert_close(in_two_parts(multiplies_all, q, *dirty, seen), block_attn_decode(q, k, v, seen))


def test_pages_in_any_order():
    q, k, v = inputs("cpu")
    size, order = 64, [5, 2, 11, 0, 1, 10, 3, 8, 4, 9, 7, 6]
    table = torch.tensor(order, dtype=torch.int32).view(3, 4)
    pages = []
    for cache in (k, v):
        page = torch.empty(12, size, 2, DIM)
        page[table.flatten().long()] = cache.unflatten(2, (4, size)).transpose(1, 2).flatten(0, 1).transpose(1, 2)
        pages.append(page)
    beyond = table.clone()
    beyond[1, 2:] = -1
    got = in_two_parts(block_attn, q, *pages, mask("cpu"), beyond)
    torch.testing.assert_close(got, block_attn_decode(q, k, v, mask("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 256])
def test_a_canvas_of_wide_heads_on_a_gpu(rows):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, rows, 512), (2, 2, 4608, 512), (2, 2, 4608, 512)
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes)
    lens = torch.tensor([4096, 77], device="cuda")
    seen = IntervalMask.decode(lens, rows, kv_len=4608)
    got = block_attn_decode(q, k, v, seen).double().cpu()
    exact = reference.block_attn_decode(*(x.double().cpu() for x in (q, k, v)), seen.to("cpu"))
    plain = block_attn_decode(q, k, v, seen, exact=True).double().cpu()
    assert (got - exact).norm() <= 1.5 * (plain - exact).norm()
