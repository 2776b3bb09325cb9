"""The public attention functions on each device, and what they refuse."""

import math

import pytest
import torch

from dflash_ext import IntervalMask, block_attn, block_attn_decode, reference


def inputs(mask, device, dtype, heads=4, kv_heads=2, head_dim=16, batch=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, mask.q_len, head_dim)] + [(batch, kv_heads, mask.kv_len, head_dim)] * 2
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def some_empty_rows(device):
    keep = torch.tensor([[True, False], [True, True]], device=device)
    return IntervalMask.anchor_blocks(11, torch.tensor([[9, 2], [4, 0]], device=device), 4, keep=keep)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_output_and_gradients(device, dtype, tolerance, softcap):
    mask = some_empty_rows(device)
    q, k, v = (x.requires_grad_() for x in inputs(mask, device, dtype))
    out = block_attn(q, k, v, mask, softcap=softcap)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = reference.block_attn(*exact, mask, softcap=softcap)
    upstream = torch.cos(torch.arange(out.numel(), device=device)).view(out.shape)
    grads = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
    wanted = torch.autograd.grad(want, exact, upstream.double())
    assert out.dtype == dtype
    for got, right in zip((out, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(got.double(), right, atol=tolerance, rtol=tolerance)
    empty = ~mask.to_bool().any(-1).expand(-1, 4, -1)
    assert empty.any() and (out[empty] == 0).all() and (grads[0][empty] == 0).all()


def test_lse(device):
    mask = some_empty_rows(device)
    q, k, v = inputs(mask, device, torch.float32)
    out, lse = block_attn(q, k, v, mask, return_lse=True)
    torch.testing.assert_close(out, block_attn(q, k, v, mask))
    empty = ~mask.to_bool().any(-1).expand(-1, 4, -1)
    assert lse.dtype == torch.float32 and torch.equal(lse == -math.inf, empty)


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


def test_autocast_casts_instead_of_refusing(device):
    mask = IntervalMask.causal(6, device=device)
    q, k, v = inputs(mask, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = block_attn(q, k, v.bfloat16(), mask)
        decoded = block_attn_decode(q, k, v.bfloat16(), mask)
    assert out.dtype == torch.bfloat16 == decoded.dtype
    want = block_attn(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert torch.equal(out, want)


def test_compiles_without_graph_breaks():
    mask = some_empty_rows("cpu")
    q, k, v = inputs(mask, "cpu", torch.float32)
    compiled = torch.compile(block_attn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, mask), block_attn(q, k, v, mask))


def reject(
    message, q=(1, 2, 3, 8), k=(1, 2, 3, 8), v=None, dtype=torch.float32, mask=None, op=block_attn, **kw
):
    q, k, v = torch.zeros(q), torch.zeros(k, dtype=dtype), torch.zeros(v or k, dtype=dtype)
    with pytest.raises(ValueError, match=message) as caught:
        op(q, k, v, IntervalMask.causal(3) if mask is None else mask, **kw)
    assert "\n" not in str(caught.value)


def test_refusals_name_the_value():
    reject("four dimensions", q=(1, 3, 8))
    reject("do not fit", k=(1, 2, 3, 16))
    reject("do not fit", k=(2, 2, 3, 8))
    reject("do not fit", v=(1, 2, 4, 8))
    reject("3 query heads are no multiple of 2", q=(1, 3, 3, 8))
    reject("head_dim is 12", q=(1, 2, 3, 12), k=(1, 2, 3, 12))
    reject("head_dim is 520", q=(1, 2, 3, 520), k=(1, 2, 3, 520))
    reject("torch.float16", dtype=torch.float16)
    reject("batch 1 and 4 rows", mask=IntervalMask.causal(4))
    reject("batch 2", mask=IntervalMask.causal(torch.tensor([1, 2]), max_len=3))
    reject("over 5 keys, k has 3", mask=IntervalMask.full(5, q_len=3))
    reject("on meta", mask=IntervalMask.causal(3, device="meta"))
    reject("the cache has 3", mask=IntervalMask.full(5, q_len=3), op=block_attn_decode)
    table = torch.zeros(2, 1, dtype=torch.int32)
    reject(r"int32 \[1, max_pages\]", k=(4, 3, 2, 8), op=block_attn_decode, block_table=table)
    q = torch.zeros(1, 2, 8, 3).mT
    with pytest.raises(ValueError, match="last dimension of q has stride 3"):
        block_attn(q, q, q, IntervalMask.causal(3))
