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

    One part of each row sees the first half of its context, and the other the rest and the block. Both are rows of one
    call, so that the keys are shared and twice as many multiprocessors have work. Pages are copied into one cache.
    """
    if block_table is not None:
        pages, _, kv_heads, dim = k_cache.shape
        where = block_table.clamp(0, pages - 1)
        k_cache, v_cache = (
            cache[where].reshape(len(where), -1, kv_heads, dim).transpose(1, 2) for cache in (k_cache, v_cache)
        )
    middle = mask.ctx_lo + (mask.ctx_hi - mask.ctx_lo).clamp(min=0) // 2
    none = torch.zeros_like(middle)
    bounds = (mask.ctx_lo, middle), (middle, mask.ctx_hi), (none, mask.blk_lo), (none, mask.blk_hi)
    parts = IntervalMask(*(torch.cat(pair, dim=1) for pair in bounds), mask.kv_len)
    keys = k_cache[:, :, : mask.kv_len], v_cache[:, :, : mask.kv_len]
    out, lse = block_attn(torch.cat([q, q], dim=2), *keys, parts, scale=scale, softcap=softcap, return_lse=True)
    rows = q.shape[2]
    share = torch.sigmoid(lse[:, :, :rows] - lse[:, :, rows:]).nan_to_num(0.0).unsqueeze(-1)
    return torch.lerp(out[:, :, rows:].float(), out[:, :, :rows].float(), share).to(q.dtype)
