"""block_attn_decode's GPU kernel: any cache, any lengths, graphs, and the bits of exact mode."""

import math

import pytest
import torch

from dflash_ext import IntervalMask, block_attn_decode, reference
from dflash_ext.ops.layer import rotate_to_cache
from python_tests.ops.test_attention import any_int32, distance

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

HALVES = [torch.bfloat16, torch.float16]


def filled(batch, heads, kv_heads, q_len, capacity, head_dim, dtype=torch.bfloat16):
    shapes = [(batch, heads, q_len, head_dim)] + [(batch, kv_heads, capacity, head_dim)] * 2
    return [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def dirty(mask, *caches):
    """The caches with NaN wherever no row of an entry sees the key."""
    seen = mask.to_bool().any(-2)[..., None]
    pad = caches[0].shape[2] - mask.kv_len
    seen = torch.nn.functional.pad(seen, (0, 0, 0, pad))
    return [cache.masked_fill(~seen, math.nan) for cache in caches]


def paged(cache, page_size, order):
    """The cache in pages, shuffled, and its table."""
    batch, heads, capacity, dim = cache.shape
    count = capacity // page_size
    pages = cache.transpose(1, 2).reshape(batch * count, page_size, heads, dim)
    where = torch.empty_like(order)
    where[order] = torch.arange(len(order), device=order.device)
    return pages[order].contiguous(), where.view(batch, count).int()


def check(got, q, k, v, mask, **options):
    want = reference.block_attn(q.double(), *(x[:, :, : mask.kv_len].double() for x in (k, v)), mask, **options)
    assert distance(got, want) <= 3 * torch.finfo(q.dtype).eps / 4
    empty = ~mask.to_bool().any(-1)
    assert not got.transpose(1, 2)[empty.expand(q.shape[0], -1, -1)[:, 0]].any()


CASES = {
    "draft": lambda: IntervalMask.decode(lengths(900, 7, 0), 16, kv_len=1000),
    "verify": lambda: IntervalMask.decode(lengths(63, 300, 64), 16, kv_len=400, causal=True),
    "one token": lambda: IntervalMask.decode(lengths(2049, 1, 511), 1, kv_len=2100),
    "fewer rows": lambda: IntervalMask.decode(lengths(90, 5, 17), 16, q_lens=lengths(16, 0, 3), kv_len=200),
    "window": lambda: IntervalMask.decode(lengths(900, 70, 10), 9, kv_len=1000, window=100, causal=True),
    "start": lambda: IntervalMask.decode(lengths(900, 70, 10), 9, kv_len=1000, kv_start=lengths(500, 69, 0)),
    "canvas": lambda: IntervalMask.decode(lengths(700, 70, 0), 256, kv_len=1000),
    "verify and draft": lambda: IntervalMask.verify_and_draft(lengths(900, 63, 10), 7, 7, kv_len=1000, window=100),
    "few rows of a wide tile": lambda: IntervalMask.decode(lengths(900, 63, 0), 17, kv_len=1000),
    "any int32": lambda: any_int32().to("cuda"),
    # Two consumers take turns here: a cluster has 512 keys a block, or a block has an item alone.
    "long rows": lambda: IntervalMask.decode(lengths(5000, 63, 2500), 16, kv_len=5100, causal=True),
    "many rows": lambda: IntervalMask.decode(lengths(*range(40), 500, 600), 1, kv_len=640),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_lengths_in_a_dirty_cache(case, head_dim, dtype):
    mask = case()
    q, k, v = filled(mask.batch, 8, 2, mask.q_len, mask.kv_len + 37, head_dim, dtype)
    for exact in (False, True):
        check(block_attn_decode(q, *dirty(mask, k, v), mask, exact=exact), q, k, v, mask)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "case", ["draft", "verify", "one token", "fewer rows", "window", "verify and draft", "canvas", "long"]
)
def test_a_constant_context_changes_no_bits(case, head_dim):
    """The kernel in front of the attention writes the last keys, one for each query row, and ends late."""
    long = IntervalMask.decode(lengths(1990, 2000, 0), 16, kv_len=2048, causal=True)
    mask = long if case == "long" else CASES[case]()
    mask = mask.plan(8, 2, head_dim, decode=True)
    size = -(-mask.kv_len // 64) * 64
    q, k, v = filled(mask.batch, 8, 2, mask.q_len, size, head_dim)
    pages = [cache.transpose(1, 2) for cache in (k, v)]
    table = torch.arange(mask.batch, dtype=torch.int32, device="cuda")[:, None]
    want = block_attn_decode(q, *pages, mask, block_table=table)
    place, end = torch.arange(size, device="cuda"), torch.maximum(mask.ctx_hi, mask.blk_hi).amax(1, keepdim=True)
    written = (place >= end - mask.q_len) & (place < end)
    positions = torch.where(written, place, -1)
    projected = torch.cat(
        [
            x.transpose(1, 2).flatten(2)
            for x in (torch.zeros(mask.batch, 8, size, head_dim, device="cuda", dtype=q.dtype), k, v)
        ],
        dim=2,
    )
    angles = torch.ones(size, 1, device="cuda"), torch.zeros(size, 1, device="cuda")
    for cache in (k, v):
        cache.masked_fill_(written[:, None, :, None], 0)
    rotate_to_cache(projected.flatten(0, 1), k, v, positions, positions, table[:, 0], *angles)
    got = block_attn_decode(q, *pages, mask, block_table=table, constant_context=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1), (8, 8), (12, 1), (32, 8), (71, 1), (128, 1)])
def test_every_ratio_of_heads(heads, kv_heads, head_dim):
    mask = CASES["verify"]()
    q, k, v = filled(3, heads, kv_heads, mask.q_len, mask.kv_len, head_dim)
    check(block_attn_decode(q, k, v, mask), q, k, v, mask)


@pytest.mark.parametrize("tiles", range(1, 10))
@pytest.mark.parametrize("kv_heads", [2, 11])  # with 11 there are enough tiles of 128 rows, so that they are not halved
@pytest.mark.parametrize(("rows", "head_dim"), [(16, 64), (5, 72), (16, 128), (16, 256), (90, 120), (90, 256)])
def test_any_number_of_blocks_shares_an_item(tiles, rows, head_dim, kv_heads):
    """A cluster has as many blocks as there are tiles of keys. What they send each other has the range of floats."""
    kv_len = 80 * tiles + 30
    mask = IntervalMask.decode(lengths(kv_len - rows, 3), rows, kv_len=kv_len, causal=tiles % 2 == 0)
    q, k, v = filled(2, 2 * kv_heads, kv_heads, rows, kv_len, head_dim)
    for scale in (1, 2.0**100, 2.0**-100):
        got = block_attn_decode(q, k, v * scale, mask)
        check(got / scale, q, k, v, mask)


@pytest.mark.parametrize("options", [{"scale": -0.3}, {"softcap": 5.0}, {"softcap": 5.0, "scale": 2.0}])
def test_options(options):
    mask = CASES["draft"]()
    q, k, v = filled(3, 8, 2, mask.q_len, mask.kv_len, 128)
    check(block_attn_decode(q, k, v, mask, **options), q, k, v, mask, **options)


@pytest.mark.parametrize("page_size", [16, 24, 48, 64, 256])
@pytest.mark.parametrize(("rows", "head_dim"), [(16, 128), (40, 128), (40, 256), (160, 128), (160, 256)])
@pytest.mark.parametrize("exact", [False, True])
def test_pages(page_size, rows, head_dim, exact):
    cached = lengths(600, 33, 5)
    mask = IntervalMask.decode(cached, rows, kv_len=3 * 256)
    q, k, v = filled(3, 8, 2, rows, 3 * 256, head_dim)
    order = torch.randperm(3 * (768 // page_size), device="cuda")
    (k_pages, table), (v_pages, _) = (paged(cache, page_size, order) for cache in dirty(mask, k, v))
    last = (cached + rows + page_size - 1) // page_size
    table = table.masked_fill(torch.arange(table.shape[1], device="cuda") >= last[:, None], -1)
    got = block_attn_decode(q, k_pages, v_pages, mask, block_table=table, exact=exact)
    check(got, q, k, v, mask)
    # Other pages are served by a portable kernel, which adds in another order.
    assert torch.equal(got, block_attn_decode(q, k, v, mask, exact=exact)) or not exact or page_size % 16


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("longest", [300, 4150])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(head_dim, value, longest):
    kv_len = longest + 100
    mask = IntervalMask.decode(lengths(longest, 61, 0), 24, kv_len=kv_len, causal=True)
    q, k, v = filled(3, 8, 2, 24, kv_len, head_dim)
    want = reference.block_attn(q.double(), k.double(), v.double(), mask)
    seen = torch.zeros(3, 24, dtype=torch.bool, device="cuda")
    for b, length in enumerate((longest, 61, 0)):
        v[b, :, length + 20] = value
        seen[b, 20:] = True
    got = block_attn_decode(q, k, v, mask).transpose(1, 2)
    assert distance(got[~seen], want.transpose(1, 2)[~seen]) <= 3 * torch.finfo(q.dtype).eps / 4
    assert not got[seen].isfinite().any()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_strides(head_dim):
    """Caches that keep a token's heads together, and addresses that are odd."""
    mask = CASES["verify"]()
    q = torch.randn(3, 16, 8, head_dim + 1, device="cuda", dtype=torch.bfloat16)[..., 1:].transpose(1, 2)
    k, v = (torch.randn(3, 450, 2, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    check(block_attn_decode(q, k, v, mask), q, k, v, mask)
    odd = torch.randn(3, 2, 450, head_dim + 3, device="cuda", dtype=torch.bfloat16)[..., 3:]
    check(block_attn_decode(q, odd, v, mask), q, odd, v, mask)


@pytest.mark.parametrize("window", [None, 400])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rows"), [(8, 128, 16), (6, 64, 16), (8, 256, 16), (8, 128, 90), (8, 512, 16)]
)
def test_a_row_has_the_same_bits_wherever_it_stands(heads, head_dim, rows, window):
    """In exact mode: alone or in a batch, in a longer cache, in another block, with another mask beside it."""
    q, k, v = filled(4, heads, 2, rows, 3000, head_dim)
    lens = lengths(1500, 300, 2900, 0)
    options = dict(causal=True, window=window)
    mask = IntervalMask.decode(lens, rows, kv_len=3000, **options)
    together = block_attn_decode(q, k, v, mask, exact=True)
    assert torch.equal(block_attn_decode(q, k, v, mask.plan(heads, 2, head_dim, decode=True), exact=True), together)
    check(together, q, k, v, mask)
    for b, length in enumerate(lens.tolist()):
        one = slice(b, b + 1)
        alone = IntervalMask.decode(length, rows, kv_len=length + rows, device="cuda", **options)
        got = block_attn_decode(q[one], k[one], v[one], alone, exact=True)
        assert torch.equal(got, together[one]), length
        for row in (0, 7, rows - 1):
            single = IntervalMask.decode(length + row, 1, kv_len=3000, device="cuda", **options)
            got = block_attn_decode(q[one, :, row : row + 1], k[one], v[one], single, exact=True)
            assert torch.equal(got, together[one, :, row : row + 1]), (length, row)


def test_one_graph_serves_all_lengths():
    q, k, v = filled(3, 32, 8, 16, 2100, 128)
    lens = lengths(1000, 20, 300)

    def decode():
        mask = IntervalMask.decode(lens, 16, kv_len=2100).plan(32, 8, 128, decode=True)
        return [block_attn_decode(q, k, v, mask) for _ in range(3)]

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = decode()
    for new in (lengths(2000, 0, 1), lengths(5, 1999, 1024)):
        lens.copy_(new)
        graph.replay()
        mask = IntervalMask.decode(lens, 16, kv_len=2100)
        for out in outs:
            check(out, q, k, v, mask)


def test_nothing_to_do():
    for batch, q_len, kv_len in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        mask = IntervalMask(*torch.zeros(4, 1, q_len, dtype=torch.int32, device="cuda"), kv_len)
        q, k, v = filled(batch, 4, 2, q_len, kv_len, 64)
        out = block_attn_decode(q, k, v, mask)
        assert out.shape == q.shape and not out.any()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kv_len", [800, 4200])
@pytest.mark.parametrize(("rows", "head_dim"), [(1, 64), (16, 128), (40, 128), (40, 256), (16, 512)])
def test_a_plan_of_lengths_that_have_changed_gives_nan(rows, head_dim, kv_len, exact):
    """Also where the plan is made for larger tiles than those of the kernel that serves."""
    mask = IntervalMask.decode(lengths(700, 70, 0), rows, kv_len=kv_len).plan(8, 2, head_dim, decode=True)
    q, k, v = filled(3, 8, 2, rows, kv_len, head_dim)
    graph = torch.cuda.CUDAGraph()
    block_attn_decode(q, k, v, mask, exact=exact)
    with torch.cuda.graph(graph):
        captured = block_attn_decode(q, k, v, mask, exact=exact)
    graph.replay()
    check(captured, q, k, v, mask)
    mask.ctx_hi[0].sub_(300)
    mask.ctx_hi[2] = 200
    for got in (block_attn_decode(q, k, v, mask, exact=exact), graph.replay() or captured):
        assert got[0].isnan().all() and got[2].isnan().all()
        check(got[1:2], *(x[1:2] for x in (q, k, v)), IntervalMask(*(x[1:2] for x in mask._bounds()), kv_len))


@pytest.mark.parametrize(("rows", "head_dim"), [(16, 128), (40, 128), (100, 256), (65, 80)])
def test_exact_mode_has_the_same_bits_with_any_plan(rows, head_dim):
    mask = IntervalMask.decode(lengths(700, 70, 0), rows, kv_len=900, causal=True)
    q, k, v = filled(3, 8, 2, rows, 900, head_dim)
    want = block_attn_decode(q, k, v, mask, exact=True)
    assert torch.equal(block_attn_decode(q, k, v, mask.plan(8, 2, head_dim, decode=True), exact=True), want)


def test_a_plan_without_keys_gives_nan_once_there_are_some():
    mask = IntervalMask(*torch.zeros(4, 1, 9, dtype=torch.int32, device="cuda"), 2000).plan(4, 2, 128, decode=True)
    q, k, v = filled(1, 4, 2, 9, 2000, 128)
    mask.blk_hi[:, 7] = 9
    for exact in (False, True):
        got = block_attn_decode(q, k, v, mask, exact=exact)
        assert got.isnan().any(-1).nonzero()[:, 2].unique().tolist() == [7]


@pytest.mark.parametrize("exact", [False, True])
def test_opcheck(exact):
    """The schema says that a call writes to none of its arguments, the plan included."""
    mask = CASES["verify"]().plan(8, 2, 64, decode=True)
    bounds = mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi
    call = *filled(3, 8, 2, 16, 400, 64), *bounds, mask.kv_len, None, mask.tiles, exact, False, 0.1, None
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dflash_ext.block_attn_decode, call, test_utils=tests)
