"""Decoding of many rows above head_dim 256, which the forward serves with two rows for each row of queries."""

import pytest
import torch

from dflash_ext import IntervalMask, block_attn_decode, reference

pytestmark = pytest.mark.gpu
ROWS, DIM, CAPACITY = 70, 264, 250


def inputs(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, ROWS, DIM), (3, 2, CAPACITY, DIM), (3, 2, CAPACITY, DIM)
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def mask(**options):
    """Rows behind a long, a short and no context; one row of the batch is shorter than the others."""
    lens, counts = torch.tensor([150, 1, 0], device="cuda"), torch.tensor([ROWS, ROWS, 5], device="cuda")
    return IntervalMask.decode(lens, ROWS, q_lens=counts, kv_len=CAPACITY, **options)


def assert_right(got, q, k, v, seen, **options):
    """Against float64; two halves may be rounded before they are added."""
    want = reference.block_attn_decode(*(x.double().cpu() for x in (q, k, v)), seen.to("cpu"), **options)
    torch.testing.assert_close(got.double().cpu(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 40, "causal": True}, {"kv_start": 100}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_halves_make_the_whole(options, dtype):
    q, k, v = inputs(dtype)
    seen = mask(**options)
    got = block_attn_decode(q, k, v, seen, scale=0.1, softcap=4.0)
    assert_right(got, q, k, v, seen, scale=0.1, softcap=4.0)
    assert not got[2, :, 5:].any()


def test_intervals_in_any_place():
    """They also overlap, end before they begin, and lie beyond the keys."""
    q, k, v = inputs()
    for case in range(10):
        generator = torch.Generator().manual_seed(case)
        bounds = torch.randint(-50, CAPACITY + 50, (4, 3, ROWS), dtype=torch.int32, generator=generator)
        bounds[:, 0, ::7] = torch.tensor([-(2**31), 2**31 - 1, 2**31 - 1, -(2**31)], dtype=torch.int32)[:, None]
        bounds[:, 1, ::7] = torch.tensor([2**31 - 1, 2**31 - 1, 3, 90], dtype=torch.int32)[:, None]
        seen = IntervalMask(*bounds.cuda(), CAPACITY)
        assert_right(block_attn_decode(q, k, v, seen), q, k, v, seen)


@pytest.mark.parametrize("entries", [1, 3])
def test_keys_that_no_row_sees_may_be_nan(entries):
    q, k, v = inputs()
    bounds = torch.tensor([3, 40, 90, 95], dtype=torch.int32)[:, None, None].repeat(1, entries, ROWS)
    bounds[:, 0, 5] = torch.tensor([200, 230, 150, 30])
    seen = IntervalMask(*bounds.cuda(), CAPACITY)
    unseen = ~seen.to_bool().any(-2)[..., None]
    got = block_attn_decode(q, *(x.masked_fill(unseen, torch.nan) for x in (k, v)), seen)
    assert_right(got, q, k, v, seen)


def test_pages_in_any_order_and_rows_that_are_not_aligned():
    q, k, v = inputs()
    size, order = 64, [5, 2, 11, 0, 1, 10, 3, 8, 4, 9, 7, 6]
    table = torch.tensor(order, dtype=torch.int32, device="cuda").view(3, 4)
    pages = []
    for cache in (k, v):
        whole = torch.nn.functional.pad(cache, (0, 0, 0, 4 * size - CAPACITY))
        memory = torch.empty(12 * size * 2 * DIM + 1, dtype=cache.dtype, device="cuda")
        page = memory[1:].view(12, size, 2, DIM)
        page[table.flatten().long()] = whole.unflatten(2, (4, size)).transpose(1, 2).flatten(0, 1).transpose(1, 2)
        pages.append(page)
    beyond = table.clone()
    beyond[1, 2:] = -1
    got = block_attn_decode(q, *pages, mask(), block_table=beyond)
    assert torch.equal(got, block_attn_decode(q, k, v, mask()))
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(got, block_attn_decode(transposed, *pages, mask(), block_table=beyond))


@pytest.mark.parametrize("rows", [64, 256])
def test_a_canvas_is_as_exact_as_in_one_part(rows):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, rows, 512), (2, 2, 4608, 512), (2, 2, 4608, 512)
    q, k, v = (torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes)
    lens = torch.tensor([4096, 77], device="cuda")
    seen = IntervalMask.decode(lens, rows, kv_len=4608)
    got = block_attn_decode(q, k, v, seen).double().cpu()
    exact = reference.block_attn_decode(*(x.double().cpu() for x in (q, k, v)), seen.to("cpu"))
    plain = block_attn_decode(q, k, v, seen, exact=True).double().cpu()
    assert (got - exact).norm() <= 1.5 * (plain - exact).norm()


def test_a_replayed_graph_follows_its_inputs():
    q, k, v = inputs()
    lens = torch.tensor([150, 1, 0], device="cuda")

    def call():
        return block_attn_decode(q, k, v, IntervalMask.decode(lens, ROWS, kv_len=CAPACITY))

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    lens.copy_(torch.tensor([20, 170, 90]))
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, call())
