"""Every constructor against its rule, written here once more for one (row, key) pair at a time."""

import copy
import dataclasses
import doctest
import io
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

import dflash_ext.masks
from dflash_ext import IntervalMask, block_attn, reference

settings.register_profile("masks", max_examples=40, deadline=None)
settings.load_profile("masks")

LEN = st.integers(0, 9)
LENS = st.lists(st.integers(0, 9), min_size=1, max_size=3)
BLOCK = st.integers(1, 4)
WINDOW = st.integers(1, 6)


def matrix(rows, keys, sees):
    return torch.tensor([[bool(sees(i, j)) for j in range(keys)] for i in range(rows)]).reshape(rows, keys)


def assert_mask(mask, entries):
    """entries: one bool [Lq, Lk] matrix per batch entry."""
    want = torch.stack(entries)[:, None]
    assert torch.equal(mask.to_bool().expand_as(want), want)
    for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi):
        assert ((bound >= 0) & (bound <= mask.kv_len)).all()


def causal(i, j):
    return j <= i


def windowed(i, j, window):
    return j <= i and i - j < window


def prefix_lm(i, j, prefix):
    return j < prefix or j <= i


def prefix_block(i, j, prefix):
    return j <= i if i < prefix else True


def block_causal(i, j, block_size, prefix):
    if i < prefix:
        return j <= i
    return j < prefix or (j - prefix) // block_size <= (i - prefix) // block_size


def block_diffusion(i, j, block_size, half):
    """The first half of the rows and keys is noised, the second clean."""
    noised_row, noised_key = i < half, j < half
    row_block, key_block = i % half // block_size, j % half // block_size
    if noised_row:
        return key_block == row_block if noised_key else key_block < row_block
    return not noised_key and key_block <= row_block


# The constructors of self-attention, each with its rule.
SELF_ATTENTION = {
    "causal": (IntervalMask.causal, causal),
    "sliding_window": (partial(IntervalMask.sliding_window, window=3), partial(windowed, window=3)),
    "prefix_lm": (partial(IntervalMask.prefix_lm, prefix_len=4), partial(prefix_lm, prefix=4)),
    "prefix_block": (partial(IntervalMask.prefix_block, prefix_len=4), partial(prefix_block, prefix=4)),
    "block_causal": (
        partial(IntervalMask.block_causal, block_size=3, prefix_len=2),
        partial(block_causal, block_size=3, prefix=2),
    ),
}


@pytest.mark.parametrize("name", SELF_ATTENTION)
@given(lens=LENS, extra=st.integers(0, 2), packed_tail=st.integers(0, 3))
def test_self_attention_at_one_length_in_padded_batches_and_packed(name, lens, extra, packed_tail):
    build, rule = SELF_ATTENTION[name]
    assert_mask(build(lens[0]), [matrix(lens[0], lens[0], rule)])

    width = max(lens) + extra
    padded = [matrix(width, width, lambda i, j, n=n: i < n and j < n and rule(i, j)) for n in lens]
    assert_mask(build(torch.tensor(lens), max_len=width), padded)

    offsets = torch.tensor([0, *lens]).cumsum(0)
    total = int(offsets[-1]) + packed_tail
    documents = torch.block_diag(*(matrix(n, n, rule) for n in lens), torch.zeros(packed_tail, packed_tail))
    assert_mask(IntervalMask.packed(offsets.tolist(), build, total_len=total), [documents.bool()])
    assert_mask(IntervalMask.packed(offsets, build, total_len=total, max_len=width), [documents.bool()])


@given(length=LEN, prefixes=LENS, block_size=BLOCK, window=WINDOW)
def test_parameters_may_differ_by_row(length, prefixes, block_size, window):
    def rows(rule, **fixed):
        return [matrix(length, length, partial(rule, prefix=p, **fixed)) for p in prefixes]

    given = torch.tensor(prefixes, dtype=torch.int32)
    assert_mask(IntervalMask.prefix_lm(length, given), rows(prefix_lm))
    assert_mask(IntervalMask.prefix_block(length, given), rows(prefix_block))
    blocks = rows(block_causal, block_size=block_size)
    assert_mask(IntervalMask.block_causal(length, block_size, given), blocks)
    sliding = matrix(length, length, partial(windowed, window=window))
    assert_mask(IntervalMask.sliding_window(length, window), [sliding])


@given(lens=LENS, prefixes=st.lists(LEN, min_size=3, max_size=3))
def test_packed_documents_have_their_own_prefixes(lens, prefixes):
    offsets = torch.tensor([0, *lens]).cumsum(0).tolist()
    given = torch.tensor(prefixes[: len(lens)])
    want = torch.block_diag(
        *(matrix(n, n, partial(prefix_block, prefix=p)) for n, p in zip(lens, prefixes, strict=False))
    )
    inner = partial(IntervalMask.prefix_block, prefix_len=given)
    assert_mask(IntervalMask.packed(offsets, inner), [want.bool().reshape(sum(lens), sum(lens))])


@given(lens=st.lists(st.integers(1, 8), min_size=1, max_size=3), block_size=BLOCK)
def test_block_diffusion(lens, block_size):
    width = max(lens)

    def sees(i, j, length):
        if i % width >= length or j % width >= length:
            return False
        return block_diffusion(i, j, block_size, width)

    want = [matrix(2 * width, 2 * width, partial(sees, length=n)) for n in lens]
    assert_mask(IntervalMask.block_diffusion(torch.tensor(lens), block_size, max_len=width), want)
    alone = matrix(2 * width, 2 * width, partial(sees, length=width))
    assert_mask(IntervalMask.block_diffusion(width, block_size), [alone])
    assert_mask(IntervalMask.block_diffusion(width + 3, block_size, max_len=width), [alone])


@given(
    runs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.bool, torch.int32, torch.int64]),
)
def test_from_padding(runs, dtype):
    """Padding, tokens, padding; and rows of nothing but padding."""
    width = max(map(sum, runs))
    tokens = torch.tensor([[left <= i < left + n for i in range(width)] for left, n, _ in runs], dtype=torch.bool)
    want = [matrix(width, width, lambda i, j, row=row: row[i] and row[j] and j <= i) for row in tokens]
    assert_mask(IntervalMask.from_padding(tokens.to(dtype)), want)


@given(bits=st.lists(st.booleans(), min_size=12, max_size=12))
def test_from_padding_takes_one_run_and_refuses_two(bits):
    tokens = torch.tensor(bits).view(2, 6)
    runs = [len("".join(".#"[x] for x in row).replace(".", " ").split()) for row in tokens.int().tolist()]
    if max(runs) <= 1:
        assert torch.equal(IntervalMask.from_padding(tokens).to_bool().diagonal(dim1=2, dim2=3)[:, 0], tokens)
    else:
        entry = next(b for b, n in enumerate(runs) if n > 1)
        with pytest.raises(ValueError, match=f"batch entry {entry} of attention_mask is not one run of ones"):
            IntervalMask.from_padding(tokens)


@given(
    positions=st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_from_position_ids(positions, dtype):
    def sees(i, j, ids):
        return j <= i and all(ids[t] == ids[t - 1] + 1 for t in range(j + 1, i + 1))

    want = [matrix(7, 7, partial(sees, ids=ids)) for ids in positions]
    assert_mask(IntervalMask.from_position_ids(torch.tensor(positions, dtype=dtype)), want)


@given(lens=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_positions_of_packed_documents(lens):
    positions = torch.cat([torch.arange(n) for n in lens])[None]
    offsets = torch.tensor([0, *lens]).cumsum(0).tolist()
    want = IntervalMask.packed(offsets, IntervalMask.causal).to_bool()
    assert torch.equal(IntervalMask.from_position_ids(positions).to_bool(), want)


def test_padding_and_positions_of_nothing():
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert IntervalMask.from_padding(nothing).to_bool().shape == (2, 1, 0, 0)
    assert IntervalMask.from_position_ids(nothing).to_bool().shape == (2, 1, 0, 0)


@given(lens=LENS, q_len=LEN)
def test_full(lens, q_len):
    want = [matrix(q_len, 9, lambda i, j, n=n: j < n) for n in lens]
    assert_mask(IntervalMask.full(torch.tensor(lens), q_len=q_len, kv_len=9), want)
    assert_mask(IntervalMask.full(lens[0]), [torch.ones(lens[0], lens[0], dtype=torch.bool)])


@st.composite
def anchored(draw):
    """Unsorted anchors, kept and dropped, over a context of packed documents."""
    batch, count, context_len = draw(st.integers(1, 2)), draw(st.integers(0, 4)), draw(st.integers(1, 9))
    positions = st.integers(0, context_len - 1)
    anchors = [[draw(positions) for _ in range(count)] for _ in range(batch)]
    keep = [[draw(st.booleans()) for _ in range(count)] for _ in range(batch)]
    document_start = []
    for _ in range(batch):
        starts = sorted({0, *draw(st.lists(positions, max_size=2))})
        document_start.append([max(s for s in starts if s <= pos) for pos in range(context_len)])
    return context_len, anchors, keep, document_start


@given(
    case=anchored(),
    block_size=BLOCK,
    window=st.none() | WINDOW,
    convention=st.sampled_from(["specforge", "zlab", "speculators"]),
    causal=st.none() | st.booleans(),
    include_context=st.booleans(),
)
def test_anchor_blocks(case, block_size, window, convention, causal, include_context):
    """The three conventions, written from SpecForge's, z-lab's and speculators' own mask functions."""
    context_len, anchors, keep, document_start = case
    batch, count = len(anchors), len(anchors[0])
    head = context_len if include_context else 0
    if convention == "specforge" and window is not None:
        causal = None  # SpecForge's sliding layers are always causal
    in_block = (window is not None and convention != "speculators") if causal is None else causal

    def sees(row, key, b):
        if row < head:
            near = window is None or row - key < window
            return document_start[b][row] <= key <= row and near
        n, slot = divmod(row - head, block_size)
        anchor = anchors[b][n]
        if not keep[b][n]:
            return False
        if key < context_len:
            if not document_start[b][anchor] <= key < anchor:
                return False
            if window is None:
                return True
            return anchor - key <= window if convention == "speculators" else anchor + slot - key < window
        key_block, key_slot = divmod(key - context_len, block_size)
        if key_block != n or (in_block and key_slot > slot):
            return False
        return window is None or convention != "zlab" or abs(slot - key_slot) < window

    by_token = torch.tensor(document_start)
    given_anchors = torch.tensor(anchors, dtype=torch.int64).reshape(batch, count)
    mask = IntervalMask.anchor_blocks(
        context_len,
        given_anchors,
        block_size,
        keep=torch.tensor(keep, dtype=torch.bool).reshape(batch, count),
        context_start=by_token if include_context else by_token.gather(1, given_anchors),
        window=window,
        convention=convention,
        causal=causal,
        include_context=include_context,
    )
    rows, keys = head + count * block_size, context_len + count * block_size
    assert_mask(mask, [matrix(rows, keys, partial(sees, b=b)) for b in range(batch)])


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=3),
    causal_block=st.booleans(),
    window=st.none() | WINDOW,
)
def test_decode(rows, causal_block, window):
    block_len, capacity = 4, 12

    def sees(slot, key, cached, length, start):
        pos = cached + slot
        if slot >= length or key >= cached + length or key < start:
            return False
        if window is not None and pos - key >= window:
            return False
        return key <= pos or not causal_block

    rows = [(c, n, min(start, c)) for c, n, start in rows]
    cached, lengths, starts = (torch.tensor(column) for column in zip(*rows, strict=True))
    mask = IntervalMask.decode(
        cached,
        block_len,
        q_lens=lengths,
        kv_start=starts,
        causal=causal_block,
        window=window,
        kv_len=capacity,
    )
    want = [matrix(block_len, capacity, partial(sees, cached=c, length=n, start=s)) for c, n, s in rows]
    assert_mask(mask, want)
    c = rows[0][0]
    alone = matrix(block_len, c + block_len, partial(sees, cached=c, length=block_len, start=0))
    assert_mask(IntervalMask.decode(c, block_len, causal=causal_block, window=window), [alone])


@given(
    lens=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    group=st.integers(1, 4),
    groups=st.none() | st.integers(1, 3),
    causal_group=st.booleans(),
    window=st.none() | WINDOW,
)
def test_verify_and_draft(lens, rows, group, groups, causal_group, window):
    groups = groups and min(groups, rows)
    several = rows if groups is None else groups

    def place(key, cached):
        """The position of a key and the row behind which its group stands (None: no group), or None for no key."""
        if key < cached + rows:
            return key, None
        row, slot = divmod(key - cached - rows, group)
        return (cached + row + 1 + slot, row) if row < several else None

    def sees(query, key, cached, exist):
        mine, other = place(cached + query, cached), place(key, cached)
        if other is None:
            return False
        (position, own), (key_position, group_of_key) = mine, other
        if (query if own is None else own) >= exist:
            return False
        if window is not None and position - key_position >= window:
            return False
        if group_of_key is None:
            return key <= (position if own is None else cached + own)
        looks_ahead = not causal_group and (window is None or key_position - position < window)
        return group_of_key == own and (looks_ahead or key_position <= position)

    count = rows + several * group
    options = dict(groups=groups, causal=causal_group, window=window)
    cached, exist = (torch.tensor(column) for column in zip(*lens, strict=True))
    mask = IntervalMask.verify_and_draft(cached, rows, group, q_lens=exist, kv_len=25, **options)
    assert_mask(mask, [matrix(count, 25, partial(sees, cached=c, exist=n)) for c, n in lens])
    c = lens[0][0]
    alone = matrix(count, c + count, partial(sees, cached=c, exist=rows))
    assert_mask(IntervalMask.verify_and_draft(c, rows, group, **options), [alone])
    # The rows that verify see what they see without groups.
    verified = IntervalMask.decode(cached, rows, q_lens=exist, causal=True, window=window, kv_len=25)
    assert torch.equal(mask.to_bool()[:, :, :rows], verified.to_bool())
    # Their context is the cache alone.
    assert torch.equal(mask.ctx_hi[:, :rows], verified.ctx_hi)


LENGTHS = st.sampled_from([-3, 0, 1, 4, 9, 12, 2**31 - 1, -(2**31)])


@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(
    rows=st.lists(st.tuples(LENGTHS, LENGTHS, LENGTHS), min_size=1, max_size=3),
    shared=st.sets(st.integers(0, 2)),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    causal=st.booleans(),
    window=st.none() | st.sampled_from([1, 2, 5, 2**31 - 2, 2**31, 2**33]),
    convention=st.none() | st.sampled_from(["zlab", "speculators"]),
)
@example([(2**31 - 1, 1, -3)], set(), torch.int32, False, 2**31, None)
def test_the_operator_of_decode_gives_the_bounds_of_its_definition(on, rows, shared, dtype, causal, window, convention):
    """At any lengths, those outside the buffer included. A length that is shared serves the whole batch."""
    columns = [torch.tensor(column[:1] if i in shared else column) for i, column in enumerate(zip(*rows, strict=True))]
    want = reference.decode_mask(*columns, 6, 10, causal, window, convention)
    cached, lengths, starts = (column.to(on, dtype) for column in columns)
    mask = IntervalMask.decode(
        cached, 6, q_lens=lengths, kv_start=starts, causal=causal, window=window, convention=convention, kv_len=10
    )
    got = torch.stack((mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi)).cpu()
    assert torch.equal(got, want.int())


def test_decode_takes_lengths_of_any_stride_and_no_rows():
    lens = torch.tensor([3, 99, 5, 99])[::2]
    want = IntervalMask.decode(lens.clone(), 2, kv_len=9)
    assert torch.equal(IntervalMask.decode(lens, 2, kv_len=9).to_bool(), want.to_bool())
    assert IntervalMask.decode(lens[:0], 2, kv_len=9).ctx_lo.shape == (0, 2)
    assert IntervalMask.decode(lens, 0, kv_len=9).ctx_lo.shape == (2, 0)


def test_registration_of_decode(device):
    lens, starts = torch.tensor([3, 5], device=device), torch.tensor([1], dtype=torch.int32, device=device)
    for arguments in ((lens, None, starts, 4, 0, 4, 9, True, None, 0), (starts, lens, None, 0, 2, 4, 9, False, 3, 1)):
        torch.library.opcheck(torch.ops.dflash_ext.decode_mask, arguments)


def test_the_operator_of_decode_refuses_what_does_not_fit():
    lens = torch.tensor([3, 5])
    decode_mask = torch.ops.dflash_ext.decode_mask
    for arguments, message in (
        ((lens.float(), None, None, 4, 0, 4, 9, True, None, 0), "cache_lens must be int32 or int64"),
        ((lens[None], None, None, 4, 0, 4, 9, True, None, 0), "cache_lens must be int32 or int64"),
        ((lens, lens.repeat(2), None, 4, 0, 4, 9, True, None, 0), "q_lens is for 4 rows of the batch, others for 2"),
        ((lens, None, None, 4, 0, -1, 9, True, None, 0), "-1 rows"),
        ((lens, None, None, 4, 0, 4, 2**31, True, None, 0), "2147483648 keys"),
        ((lens, None, None, 4, 0, 4, 9, True, 0, 0), "window is 0"),
        ((lens, None, None, 4, 0, 4, 9, True, 1, 3), "convention 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decode_mask(*arguments)


@pytest.mark.gpu
def test_a_graph_makes_the_mask_of_new_lengths():
    lens = torch.tensor([3, 5], device="cuda")
    graph = torch.cuda.CUDAGraph()
    IntervalMask.decode(lens, 4, kv_len=12)
    with torch.cuda.graph(graph):
        mask = IntervalMask.decode(lens, 4, kv_len=12)
    lens.copy_(torch.tensor([8, 0]))
    graph.replay()
    assert torch.equal(mask.to_bool(), IntervalMask.decode(lens, 4, kv_len=12).to_bool())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("convention", ["zlab", "speculators"])
def test_anchor_blocks_and_decode_show_a_block_the_same_keys(convention, window, causal):
    options = dict(window=window, convention=convention, causal=causal)
    training = IntervalMask.anchor_blocks(8, torch.tensor([[5]]), 4, **options).to_bool()[0, 0]
    decoding = IntervalMask.decode(5, 4, **options).to_bool()[0, 0]
    assert torch.equal(torch.cat((training[:, :5], training[:, 8:]), dim=1), decoding)


# ---- other forms -----------------------------------------------------------------------------------------


@given(bounds=st.lists(st.integers(0, 7), min_size=24, max_size=24))
def test_any_two_intervals_survive_a_round_trip(bounds):
    mask = IntervalMask(*torch.tensor(bounds, dtype=torch.int32).view(4, 2, 3), kv_len=7)
    dense = mask.to_bool()
    for form in (dense, dense[:, 0], mask.to_dense(torch.float32), mask.to_dense(torch.float16)):
        assert torch.equal(IntervalMask.from_dense(form).to_bool(), dense)
    assert torch.equal(IntervalMask.from_dense(dense[1, 0]).to_bool(), dense[1:])


@given(visible=st.lists(st.booleans(), min_size=24, max_size=24))
def test_from_dense_takes_two_runs_and_refuses_three(visible):
    dense = torch.tensor(visible).view(2, 2, 6)
    runs = [["".join(".#"[x] for x in row).replace(".", " ").split() for row in b] for b in dense.int().tolist()]
    worst = next(((b, i) for b in range(2) for i in range(2) if len(runs[b][i]) > 2), None)
    if worst is None:
        assert torch.equal(IntervalMask.from_dense(dense).to_bool()[:, 0], dense)
    else:
        with pytest.raises(ValueError, match=f"row {worst[1]} of batch entry {worst[0]} sees 3 separate runs"):
            IntervalMask.from_dense(dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_to_dense_is_finite_zero_where_visible_and_lowest_elsewhere(dtype):
    mask = IntervalMask.block_diffusion(6, 2)
    dense = mask.to_dense(dtype)
    assert dense.dtype == dtype and dense.isfinite().all()
    assert torch.equal(dense == 0, mask.to_bool())
    assert (dense[~mask.to_bool()] == torch.finfo(dtype).min).all()


def test_a_row_that_sees_nothing_is_uniform_under_to_dense():
    mask = IntervalMask.full(torch.tensor([0]), q_len=1, kv_len=4)
    scores = torch.tensor([3.0, -2.0, 0.5, 1.0]) + mask.to_dense(torch.float32)
    assert torch.equal(scores.softmax(-1), torch.full((1, 1, 1, 4), 0.25))


@pytest.mark.parametrize(
    "mask",
    [
        IntervalMask.anchor_blocks(300, torch.tensor([[250, 7], [140, 0]]), 4, keep=torch.tensor([[True] * 2] * 2)),
        IntervalMask.block_causal(260, 16, 10),
    ],
    ids=["batch", "one for all"],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_to_flex_is_the_same_mask(mask):
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    flex = mask.to_flex()
    again = create_mask(flex.mask_mod, mask.batch, 1, mask.q_len, mask.kv_len, device="cpu")
    assert torch.equal(again, mask.to_bool())
    torch.manual_seed(0)
    q = torch.randn(mask.batch, 2, mask.q_len, 8)
    k, v = torch.randn(2, mask.batch, 2, mask.kv_len, 8)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=flex), block_attn(q, k, v, mask))


def test_a_mask_passes_through_torch_compile_in_both_directions():
    @partial(torch.compile, fullgraph=True, backend="eager")
    def step(mask, cache_lens, x):
        fresh = IntervalMask.decode(cache_lens, 2, kv_len=mask.kv_len)
        return fresh, x + mask.to_dense(x.dtype).clamp(min=-1)

    mask = IntervalMask.prefix_block(5, 2)
    fresh, out = step(mask, torch.tensor([1, 3]), torch.zeros(5, 5))
    assert torch.equal(out, mask.to_bool().float() - 1)
    assert torch.equal(fresh.to_bool(), IntervalMask.decode(torch.tensor([1, 3]), 2, kv_len=5).to_bool())


def test_bounds_are_contiguous():
    bounds = torch.tensor([[[0, 9, 1, 9]], [[2, 9, 3, 9]], [[0, 9, 0, 9]], [[0, 9, 0, 9]]], dtype=torch.int32)[..., ::2]
    mask = IntervalMask(*bounds, 5)
    assert all(bound.is_contiguous() for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi))
    assert mask.ctx_lo.tolist() == [[0, 1]] and mask.ctx_hi.tolist() == [[2, 3]]
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 5, 8)
    strided = pytree.tree_map(lambda x: torch.stack((x, x), -1)[..., 0], mask)
    with pytest.raises(RuntimeError, match="block_attn: the mask's bounds must be contiguous"):
        block_attn(q, k, k, strided)


def test_a_mask_is_a_pytree_whose_key_count_is_structure():
    mask = IntervalMask.causal(4)
    leaves, structure = pytree.tree_flatten({"mask": mask})
    assert [leaf.shape for leaf in leaves] == [(1, 4)] * 4
    assert structure != pytree.tree_flatten({"mask": IntervalMask.full(2, q_len=4)})[1]
    doubled = pytree.tree_map(lambda x: torch.cat((x, x)), mask)
    assert doubled.batch == 2 and torch.equal(doubled.to_bool()[1:], mask.to_bool())
    pytree.tree_map(str, mask)


def with_plan(mask, tiles, heads=8, kv_heads=2, head_dim=64):
    """What `plan` would return on a GPU, if these were its tiles."""
    planned = dataclasses.replace(mask)
    planned.__dict__.update(tiles=tiles, planned_for=mask._plan_key(heads, kv_heads, head_dim, False))
    return planned


def test_a_plan_is_used_for_its_own_shapes_only():
    mask = IntervalMask.causal(4)
    assert mask.plan(8, 2, 64) is mask  # on the CPU
    tiles = torch.zeros(1, 12, dtype=torch.int32)
    planned = with_plan(mask, tiles)
    assert planned.tiles_for(8, 2, 64) is tiles
    assert planned.tiles_for(8, 2, 128) is None and planned.tiles_for(4, 2, 64) is None
    assert planned.tiles_for(8, 2, 64, decode=True) is None
    doubled = pytree.tree_map(lambda x: torch.cat((x, x)), planned)
    assert doubled.tiles.shape == (2, 12) and doubled.tiles_for(8, 2, 64) is None


def test_a_mask_of_other_bounds_has_no_plan():
    mask = IntervalMask.causal(4)
    planned = with_plan(mask, torch.zeros(1, 12, dtype=torch.int32))
    assert planned.tiles_for(8, 2, 64) is not None
    for other in (
        dataclasses.replace(planned, ctx_hi=mask.ctx_hi.clamp(max=2)),
        dataclasses.replace(planned, kv_len=5),
        planned.to("meta"),
        IntervalMask(*planned._bounds(), planned.kv_len),
    ):
        assert other.tiles is None and other.tiles_for(8, 2, 64) is None
    with pytest.raises((TypeError, ValueError), match="tiles"):
        dataclasses.replace(mask, tiles=planned.tiles)


def test_properties_and_device():
    mask = IntervalMask.decode(torch.tensor([1, 2, 3]), 4, kv_len=9)
    assert (mask.batch, mask.q_len, mask.kv_len, mask.device.type) == (3, 4, 9, "cpu")
    assert mask.to("meta").device.type == "meta"
    assert IntervalMask.causal(3, device="meta").device.type == "meta"


@pytest.mark.gpu
def test_constructors_do_not_wait_for_the_gpu():
    lens = torch.tensor([3, 5], device="cuda")
    anchors = torch.tensor([[4, 1], [0, 2]], device="cuda")
    offsets = torch.tensor([0, 3, 8], device="cuda")

    def build():
        return (
            IntervalMask.prefix_block(lens, 2, max_len=6),
            IntervalMask.block_diffusion(lens, 2, max_len=6),
            IntervalMask.packed(offsets, IntervalMask.causal, total_len=8),
            IntervalMask.anchor_blocks(6, anchors, 4, window=3),
            IntervalMask.decode(lens, 4, causal=True, kv_len=12),
            IntervalMask.verify_and_draft(lens, 2, 3, window=4, kv_len=13),
            IntervalMask.from_padding(anchors),
            IntervalMask.from_position_ids(anchors),
        )

    build()
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = build()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(mask.device.type == "cuda" for mask in masks)


# ---- refusals --------------------------------------------------------------------------------------------


BOUNDS = torch.zeros(4, 1, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IntervalMask.causal(-1), "seq_len is -1"),
        (lambda: IntervalMask.causal(torch.tensor([3.0]), max_len=3), "torch.float32"),
        (lambda: IntervalMask.prefix_block(4, torch.tensor([[1]])), "prefix_len"),
        (lambda: IntervalMask.sliding_window(4, 0), "window is 0"),
        (lambda: IntervalMask.block_causal(4, 0), "block_size is 0"),
        (lambda: IntervalMask.packed([0], IntervalMask.causal), "cu_seqlens"),
        (lambda: IntervalMask.packed([0, 4], partial(IntervalMask.block_diffusion, block_size=2)), "8 rows"),
        (lambda: IntervalMask.anchor_blocks(4, torch.tensor([1]), 2), "anchors"),
        (lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1]]), 2, convention="other"), "'other'"),
        (lambda: IntervalMask.decode(4, 2, convention="specforge"), "'zlab' and 'speculators' are supported"),
        (
            lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1]]), 2, window=3, causal=False),
            "sliding layers of 'specforge' are causal",
        ),
        (lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1]]), 2, keep=torch.ones(1, 2) > 0), "keep"),
        (lambda: IntervalMask.from_dense(torch.ones(1, 2, 3, 3, dtype=torch.bool)), r"\[1, 2, 3, 3\]"),
        (lambda: IntervalMask.from_dense(torch.tensor([[0.0, -0.5]])), "-0.5"),
        (lambda: IntervalMask(*torch.zeros(4, 1, 3).int()[:3], torch.zeros(1, 2).int(), 3), "blk_hi"),
        (lambda: IntervalMask(*torch.zeros(4, 1, 3), 3), "ctx_lo is torch.float32"),
        (lambda: IntervalMask.packed([], IntervalMask.causal), r"cu_seqlens is \[\]; two or more"),
        (lambda: IntervalMask.packed(torch.tensor([0.0, 2.0]), IntervalMask.causal, total_len=2), "torch.float32"),
        (lambda: IntervalMask.packed(torch.tensor([0]), IntervalMask.causal, total_len=2), r"torch.int64 \[1\]"),
        (lambda: IntervalMask.packed([0, 3, 4], IntervalMask.causal, max_len=2), "max_len is 2; at least 3"),
        (
            lambda: IntervalMask.packed(
                [0, 3, 4], lambda _, max_len: IntervalMask.causal(torch.tensor([3, 1, 1]), max_len=max_len)
            ),
            "inner made 3 masks of 3 rows over 3 keys; 2, or one for all",
        ),
        (lambda: IntervalMask.causal(torch.tensor([3]), max_len=-2), "causal: max_len is -2"),
        (lambda: IntervalMask.full(3, q_len=-1), "q_len is -1"),
        (lambda: IntervalMask.decode(3, -1), "block_len is -1"),
        (lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1, -1]]), 2), r"an anchor is -1; .* \[0, 4\)"),
        (lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1, 4]]), 2), r"an anchor is 4; .* \[0, 4\)"),
        (
            lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1]]), 2, keep=torch.tensor([[1]])),
            "keep is torch.int64",
        ),
        (
            lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1]]), 2, context_start=torch.zeros(1, 1)),
            "context_start is torch.float32",
        ),
        (lambda: IntervalMask.causal(4).plan(8, 3, 64), "8 query heads are no multiple of 3 key heads"),
        (lambda: IntervalMask.causal(4).plan(8, 2, 60), "head_dim is 60; multiples of 8"),
        (lambda: IntervalMask.decode(40, 8, kv_len=30), "40 cached tokens and a block of 8 exceed kv_len 30"),
        (lambda: IntervalMask.verify_and_draft(40, 2, 3, kv_len=47), "40 cached tokens and 8 rows exceed kv_len 47"),
        (lambda: IntervalMask.verify_and_draft(4, 2, 0), "verify_and_draft: group is 0; at least 1"),
        (lambda: IntervalMask.verify_and_draft(4, 2, 3, groups=0), "verify_and_draft: groups is 0; at least 1"),
        (lambda: IntervalMask.verify_and_draft(4, 2, 3, groups=3), "verify_and_draft: groups is 3; at most 2"),
        (lambda: IntervalMask(*BOUNDS[:3], BOUNDS[3].to("meta"), 3), "ctx_lo is on cpu, blk_hi on meta; one device"),
        (lambda: IntervalMask(*BOUNDS, -1), "kv_len is -1"),
        (lambda: IntervalMask(*BOUNDS, 1 << 31), "kv_len is 2147483648"),
        (lambda: IntervalMask.full(5, q_len=1, kv_len=1 << 31), "full: kv_len is 2147483648; at most 2147483647"),
        (lambda: IntervalMask.decode(5, 1, kv_len=1 << 31), "decode: kv_len is 2147483648"),
        (
            lambda: IntervalMask.decode(torch.tensor([1, 2]), 4, q_lens=torch.tensor([1, 2, 3]), kv_len=9),
            r"decode: cache_lens is torch.int64 \[2\], q_lens torch.int64 \[3\]; one batch is needed",
        ),
        (
            lambda: IntervalMask.prefix_lm(torch.tensor([1, 2]), torch.tensor([1], device="meta"), max_len=4),
            "prefix_lm: seq_len is on cpu, prefix_len on meta",
        ),
        (
            lambda: IntervalMask.anchor_blocks(4, torch.tensor([[1]]), 2, keep=torch.ones(1, 1, device="meta") > 0),
            "anchors is on cpu, keep on meta",
        ),
        (
            lambda: IntervalMask.packed(torch.tensor([0, 3]), IntervalMask.causal, total_len=3, max_len=-5),
            "packed: max_len is -5",
        ),
        (lambda: IntervalMask.from_padding(torch.ones(2, 3)), r"attention_mask is torch.float32 \[2, 3\]"),
        (lambda: IntervalMask.from_padding(torch.ones(3) > 0), r"attention_mask is torch.bool \[3\]"),
        (
            lambda: IntervalMask.from_padding(torch.tensor([[1, 1], [1, 2]])),
            "batch entry 1 of attention_mask is not one run of ones",
        ),
        (lambda: IntervalMask.from_position_ids(torch.arange(3)), r"position_ids is torch.int64 \[3\]"),
        (lambda: IntervalMask.from_position_ids(torch.ones(1, 3)), r"position_ids is torch.float32 \[1, 3\]"),
    ],
)
def test_refusals_name_the_value(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IntervalMask.prefix_block(8, 2.5), r"prefix_block: prefix_len is 2.5 \(float\); an int is needed"),
        (lambda: IntervalMask.full(True, q_len=2), r"kv_lens is True \(bool\)"),
        (lambda: IntervalMask.causal(None), "seq_len is None; an int is needed"),
        (lambda: IntervalMask.causal(torch.tensor([3])), "max_len is None; an int is needed"),
        (lambda: IntervalMask.full(torch.tensor([2])), "kv_len is None; an int is needed"),
        (lambda: IntervalMask.decode(torch.tensor([2]), 4), "kv_len is None; an int is needed"),
        (lambda: IntervalMask.packed(torch.tensor([0, 2]), IntervalMask.causal), "total_len is None; an int is needed"),
        (lambda: IntervalMask.causal(4).to_dense(torch.int64), "floating point"),
        (lambda: IntervalMask.causal([3, 4]), r"seq_len is \[3, 4\] \(list\)"),
        (lambda: IntervalMask.causal(np.array([3, 4])), "seq_len is of type ndarray"),
        (lambda: IntervalMask.sliding_window(8, 2.0), r"window is 2.0 \(float\); an int is needed"),
        (lambda: IntervalMask.sliding_window(8, torch.tensor(2.0)), r"window is torch.float32 \[\]; an int is needed"),
        (lambda: IntervalMask.block_causal(8, None), "block_size is None"),
        (lambda: IntervalMask.decode(8, 4.0), r"block_len is 4.0 \(float\)"),
        (lambda: IntervalMask.decode(8, 4, window=2.5), r"window is 2.5 \(float\); an int is needed"),
        (lambda: IntervalMask.decode([8], 4, kv_len=12), "list"),
        (lambda: IntervalMask.verify_and_draft(torch.tensor([2]), 4, 2), "kv_len is None; an int is needed"),
        (lambda: IntervalMask(*BOUNDS, 3.0), r"kv_len is 3.0 \(float\); an int is needed"),
        (lambda: IntervalMask(*BOUNDS, torch.tensor([3])), r"kv_len is torch.int64 \[1\]"),
        (lambda: IntervalMask.packed([0, 2.5], IntervalMask.causal), r"an offset of cu_seqlens is 2.5 \(float\)"),
        (lambda: IntervalMask.packed([0, 2], IntervalMask.causal(2)), "not callable"),
    ],
)
def test_what_is_no_int_is_refused_by_its_name(build, message):
    with pytest.raises(TypeError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_anchors_without_values_are_not_looked_at():
    traced = make_fx(lambda a: IntervalMask.anchor_blocks(9, a, 2).ctx_hi)(torch.tensor([[1, 3]]))
    anchors = torch.tensor([[2, 4]])
    assert torch.equal(traced(anchors), IntervalMask.anchor_blocks(9, anchors, 2).ctx_hi)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IntervalMask.packed([0, 2], lambda *_, **__: None),
        lambda: IntervalMask.anchor_blocks(8, [[1, 2]], 4),
        lambda: IntervalMask.anchor_blocks(8, torch.tensor([[1]]), 4, keep=1),
        lambda: IntervalMask.anchor_blocks(8, torch.tensor([[1]]), 4, convention=1),
        lambda: IntervalMask.from_dense([[True]]),
        lambda: IntervalMask.from_dense(torch.zeros(2, 2, dtype=torch.complex64)),
        lambda: IntervalMask.causal(4).to_dense("float32"),
        lambda: IntervalMask([[0]], *torch.zeros(3, 1, 1).int(), 1),
    ],
)
def test_what_is_of_another_type_makes_no_mask(build):
    """Python's and torch's own errors are clear here."""
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError)) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_length_may_be_any_integer():
    for build in (IntervalMask.causal, partial(IntervalMask.decode, block_len=np.int32(2), kv_len=np.int64(9))):
        given, plain = build(np.int64(4)), build(4)
        assert torch.equal(given.to_bool(), plain.to_bool()) and type(given.kv_len) is int
    offsets = np.array([0, 3, 5])
    packed = IntervalMask.packed(list(offsets), IntervalMask.causal, total_len=offsets[-1])
    assert torch.equal(packed.to_bool(), IntervalMask.packed([0, 3, 5], IntervalMask.causal).to_bool())


def test_a_window_or_block_beyond_all_keys_is_none():
    far = 10**12
    assert torch.equal(IntervalMask.sliding_window(5, far).to_bool(), IntervalMask.causal(5).to_bool())
    assert torch.equal(IntervalMask.decode(5, 3, window=far).to_bool(), IntervalMask.decode(5, 3).to_bool())
    assert IntervalMask.block_causal(5, 2**31).to_bool().all()
    assert IntervalMask.full(torch.tensor([2**32 + 3]), q_len=1, kv_len=10).to_bool().all()
    anchors = torch.tensor([[3]])
    wide = IntervalMask.anchor_blocks(10, anchors, 4, window=far, convention="speculators")
    assert torch.equal(wide.to_bool(), IntervalMask.anchor_blocks(10, anchors, 4).to_bool())


def test_anchor_blocks_of_tensors_without_values():
    with FakeTensorMode():
        assert IntervalMask.anchor_blocks(6, torch.zeros(2, 3, dtype=torch.int64), 4).q_len == 12
    build = torch.compile(lambda x: IntervalMask.anchor_blocks(6, x, 4).to_bool(), fullgraph=True, backend="eager")
    anchors = torch.tensor([[5, 1]])
    assert torch.equal(build(anchors), IntervalMask.anchor_blocks(6, anchors, 4).to_bool())


def test_a_context_of_no_tokens_has_no_rows():
    mask = IntervalMask.anchor_blocks(0, torch.tensor([[3, 1]]), 2, keep=torch.zeros(1, 2) > 0, include_context=True)
    assert mask.q_len == mask.kv_len == 4 and not mask.to_bool().any()


def test_anchors_that_are_not_kept_may_be_anywhere():
    keep, kept = torch.tensor([[True, False]]), torch.tensor([[3]])
    mask = IntervalMask.anchor_blocks(10, torch.tensor([[3, -1]]), 4, keep=keep, include_context=True)
    alone = IntervalMask.anchor_blocks(10, kept, 4, include_context=True)
    assert torch.equal(mask.to_bool()[:, :, :14, :14], alone.to_bool()) and not mask.to_bool()[:, :, 14:].any()


@pytest.mark.parametrize("offsets", [[0, 7, 3], [2, 5], [-3, 2]])
def test_packed_offsets_ascend_from_zero(offsets):
    with pytest.raises(ValueError, match="ascending offsets from 0|an offset of cu_seqlens is -3; at least 0"):
        IntervalMask.packed(offsets, IntervalMask.causal)


class Attend(torch.nn.Module):
    def forward(self, q, mask):
        return block_attn(q, q, q, mask)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_a_mask_is_an_input_of_an_exported_program(saved, planned):
    q, mask = torch.randn(1, 1, 5, 8), IntervalMask.causal(5)
    if planned:
        tiles = torch.zeros(1, 12, dtype=torch.int32)
        mask = with_plan(mask, tiles, 2, 1, 8)
    program = torch.export.export(Attend(), (q, mask))
    if saved:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    assert torch.equal(program.module()(q, mask), block_attn(q, q, q, mask))


def through_a_file(mask):
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    return torch.load(file)["mask"]


def through_a_worker(mask):
    return next(iter(DataLoader([mask], batch_size=None, num_workers=1)))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, dataclasses.replace, through_a_file, through_a_worker],
    ids=lambda function: function.__name__,
)
def test_copies(copied):
    mask = IntervalMask.prefix_block(6, torch.tensor([2, 4]))
    again = copied(mask)
    assert type(again) is IntervalMask and again is not mask and again.kv_len == 6
    assert torch.equal(again.to_bool(), mask.to_bool())
    assert (again.ctx_lo.data_ptr() == mask.ctx_lo.data_ptr()) == (copied in (copy.copy, dataclasses.replace))


def test_a_file_is_checked_like_any_bounds():
    mask = IntervalMask.causal(3)
    mask.__dict__["kv_len"] = -1
    with pytest.raises(ValueError, match="kv_len is -1"):
        through_a_file(mask)


def test_the_examples_of_docstrings():
    ran = doctest.testmod(dflash_ext.masks)
    assert ran.attempted and not ran.failed


def three_masks():
    return [IntervalMask.prefix_block(6, cut, max_len=6) for cut in (1, 3, 4)]


def test_a_data_loader_makes_one_mask_of_its_samples():
    """Also where accelerate divides every batch among processes, and where Trainer moves it."""
    samples = [{"x": torch.zeros(6), "mask": mask} for mask in three_masks()]
    for loader in (DataLoader(samples, batch_size=3), Accelerator(cpu=True).prepare(DataLoader(samples, batch_size=3))):
        (batch,) = loader
        assert type(batch["mask"]) is IntervalMask and batch["x"].shape == (3, 6)
        assert torch.equal(batch["mask"].to_bool(), torch.cat([mask.to_bool() for mask in three_masks()]))
    for rank in range(2):
        halves = [prepare_data_loader(DataLoader(samples[:2], batch_size=2), **PROCESSES, process_index=rank)]
        (half,) = halves[0]
        assert torch.equal(half["mask"].to_bool(), three_masks()[rank].to_bool())
    with pytest.raises(ValueError, match=r"masks of \[\(6, 6\), \(7, 7\)\] rows and keys do not make a batch"):
        default_collate([IntervalMask.causal(6), IntervalMask.causal(7)])


PROCESSES = {"num_processes": 2, "split_batches": True, "put_on_device": False}


def test_entries_of_a_batch():
    batch = default_collate(three_masks())
    dense = batch.to_bool()
    for entries in (slice(1, None), torch.tensor([2, 0]), torch.tensor([True, False, True]), [2, 1]):
        assert torch.equal(batch[entries].to_bool(), dense[entries])
    assert torch.equal(batch[-1].to_bool(), dense[2:])
    with pytest.raises(IndexError):
        batch[3]
    assert len(list(batch)) == 3
    for_all = three_masks()[0]
    assert for_all[1:] is for_all and for_all[0].batch == 1


@pytest.mark.gpu
def test_pinned_memory():
    mask = three_masks()[1]
    pinned = mask.pin_memory()
    assert pinned.ctx_lo.is_pinned() and pinned.blk_hi.is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).to_bool().cpu(), mask.to_bool())
    (batch,) = DataLoader(three_masks(), batch_size=3, pin_memory=True)
    assert batch.ctx_hi.is_pinned()
