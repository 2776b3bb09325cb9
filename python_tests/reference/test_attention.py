"""The definition of attention against PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from dflash_ext import IntervalMask, reference

from . import randn

MASKS = {
    "prefix_block": IntervalMask.prefix_block(9, 4),
    "block_diffusion": IntervalMask.block_diffusion(4, 2),
    "by row": IntervalMask.causal(torch.tensor([5, 7]), max_len=7),
    "anchors, one dropped": IntervalMask.anchor_blocks(
        5, torch.tensor([[4, 1], [2, 3]]), 2, keep=torch.tensor([[True, False], [True, True]])
    ),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_block_attn_is_sdpa_and_its_lse_the_log_of_the_row_sums(mask, kv_heads):
    q = randn(2, 4, mask.q_len, 8)
    k, v = randn(2, 2, kv_heads, mask.kv_len, 8, seed=1)
    out, lse = reference.block_attn(q, k, v, mask, scale=0.3, return_lse=True)
    visible = mask.to_bool()
    some = visible.any(-1, keepdim=True).expand(2, 4, -1, -1)
    want = F.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out[some[..., 0]], want[some[..., 0]])
    sums = ((q @ k.repeat_interleave(4 // kv_heads, 1).mT * 0.3).exp() * visible).sum(-1)
    torch.testing.assert_close(lse, sums.log())
    assert (out[~some[..., 0]] == 0).all() and (lse[~some[..., 0]] == -math.inf).all()


def test_block_attn_softcap():
    q, k, v = randn(3, 1, 2, 6, 8) * 3
    mask = IntervalMask.causal(6)
    scores = 2.0 * torch.tanh((q @ k.mT) * 8**-0.5 / 2.0)
    want = scores.masked_fill(~mask.to_bool(), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(reference.block_attn(q, k, v, mask, softcap=2.0), want)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_block_attn_gradients_of_output_and_lse(softcap):
    mask = MASKS["anchors, one dropped"]
    q = randn(2, 2, mask.q_len, 4).requires_grad_()
    k, v = (x.requires_grad_() for x in randn(2, 2, 1, mask.kv_len, 4, seed=1))
    empty = ~mask.to_bool().any(-1).expand(-1, 2, -1)

    def attend(q, k, v):
        out, lse = reference.block_attn(q, k, v, mask, softcap=softcap, return_lse=True)
        return out, lse.masked_fill(empty, 0.0)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    out, lse = reference.block_attn(q, k, v, mask, softcap=softcap, return_lse=True)
    grads = torch.autograd.grad((out.sum() + lse.sum()), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype):
    q, k, v = randn(3, 1, 2, 6, 8).to(dtype)
    mask = IntervalMask.causal(6)
    want = reference.block_attn(q.float(), k.float(), v.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = reference.block_attn(q, k, v, mask, return_lse=True)
        wide = reference.block_attn(q.float(), k.float(), v.float(), mask)
    assert torch.equal(out, want.to(dtype)) and torch.equal(wide, want) and lse.dtype == torch.float32


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_broken_key_reaches_the_rows_that_see_it_and_no_other(which, broken):
    mask = MASKS["by row"]  # of 5 and 7 tokens, causal: key 3 is seen from row 3 on
    q = randn(2, 4, mask.q_len, 8)
    k, v = randn(2, 2, 2, mask.kv_len, 8, seed=1)
    want = reference.block_attn(q, k, v, mask)
    (k if which == "k" else v)[:, :, 3] = broken
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = reference.block_attn(*leaves, mask)
    sees = mask.to_bool()[:, 0, :, 3][:, None].expand(-1, 4, -1)
    assert sees.any() and not sees.all()
    assert torch.equal(out[~sees], want[~sees]) and out[sees].isnan().all()
    if which == "v":
        grads = torch.autograd.grad(out[~sees].sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)


def test_decode_reads_contiguous_and_paged_caches_and_nothing_outside_the_intervals():
    cached, block_len, page_size = torch.tensor([3, 6]), 2, 4
    mask = IntervalMask.decode(cached, block_len, kv_len=10)
    q = randn(2, 4, block_len, 8)
    k, v = randn(2, 2, 2, 12, 8, seed=1)
    want = reference.block_attn(q, k[:, :, :10], v[:, :, :10], mask)
    hidden = torch.arange(12) >= (cached + block_len)[:, None]
    k, v = (x.masked_fill(hidden[:, None, :, None], math.nan) for x in (k, v))
    torch.testing.assert_close(reference.block_attn_decode(q, k, v, mask), want)

    table = torch.tensor([[4, 1, -1], [0, 3, 2]], dtype=torch.int32)
    pages = torch.full((2, 5, page_size, 2, 8), math.nan, dtype=torch.float64)
    for cache, paged in zip((k, v), pages, strict=True):
        for b, row in enumerate(table.tolist()):
            for j, page in enumerate(row):
                if page >= 0:
                    paged[page] = cache[b, :, j * page_size : (j + 1) * page_size].transpose(0, 1)
    torch.testing.assert_close(reference.block_attn_decode(q, *pages, mask, block_table=table), want)
