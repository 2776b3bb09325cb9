"""Decode attention of many rows at a head_dim above 256, which the Hopper decode kernel does not have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..masks import IntervalMask

LEAST_ROWS = 64  # a tile of the forward kernel
MOST_DIM = 256  # of the decode kernel


def in_two_parts(
    block_attn: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: IntervalMask,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``block_attn_decode`` by ``block_attn`` with twice the rows: split-KV in two parts.

    One part of each row sees the keys before the middle of its context, and the other all later ones. Both are rows of
    one call, so that the keys are shared and twice as many multiprocessors have work. Pages are copied into one cache.
    """
    if block_table is not None:
        pages, _, kv_heads, dim = k_cache.shape
        where = block_table.clamp(0, pages - 1)
        k_cache, v_cache = (
            cache[where].reshape(len(where), -1, kv_heads, dim).transpose(1, 2) for cache in (k_cache, v_cache)
        )
    bounds = (mask.ctx_lo, mask.blk_lo), (mask.ctx_hi, mask.blk_hi)
    begins, ends = (torch.stack(pair).clamp(0, mask.kv_len) for pair in bounds)  # [2, B or 1, Lq]: context, block
    ends = ends.maximum(begins)
    middle = (begins[0] + ends[0]) // 2
    (ctx_lo, blk_lo), (ctx_hi, blk_hi) = (
        torch.cat([begins, begins.maximum(middle)], dim=2),
        torch.cat([ends.minimum(middle), ends], dim=2),
    )
    parts = IntervalMask(ctx_lo, ctx_hi, blk_lo, blk_hi, mask.kv_len)
    keys, values = k_cache[:, :, : mask.kv_len], v_cache[:, :, : mask.kv_len]
    # block_attn weighs values that nobody sees by 0, which a NaN survives.
    values = values.masked_fill(_unseen(begins, ends, mask.kv_len)[:, None, :, None], 0)
    out, lse = block_attn(torch.cat([q, q], dim=2), keys, values, parts, scale=scale, softcap=softcap, return_lse=True)
    rows = q.shape[2]
    share = torch.sigmoid(lse[:, :, :rows] - lse[:, :, rows:]).nan_to_num(0.0).unsqueeze(-1)
    return torch.lerp(out[:, :, rows:].float(), out[:, :, :rows].float(), share).to(q.dtype)


def _unseen(begins: Tensor, ends: Tensor, kv_len: int) -> Tensor:
    """Which keys no row of an entry sees, bool ``[B or 1, kv_len]``: all intervals that have begun there have ended."""
    bounds = torch.stack([begins, ends]).transpose(1, 2).flatten(2).sort().values
    keys = torch.arange(kv_len, dtype=bounds.dtype, device=bounds.device).expand(*bounds.shape[:2], -1).contiguous()
    begun, ended = torch.searchsorted(bounds, keys, right=True)
    return begun == ended
