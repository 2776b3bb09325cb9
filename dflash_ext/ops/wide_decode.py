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
    bounds = torch.stack([mask.ctx_lo, mask.blk_lo, mask.ctx_hi, mask.blk_hi], dim=1).clamp_(0, mask.kv_len)
    begins, ends = bounds[:, :2], bounds[:, 2:].maximum(bounds[:, :2])  # [B or 1, 2, Lq]: context, block
    middle = (begins[:, :1] + ends[:, :1]) // 2
    lows, highs = torch.cat([begins, begins.maximum(middle)], 2), torch.cat([ends.minimum(middle), ends], 2)
    parts = IntervalMask(lows[:, 0], highs[:, 0], lows[:, 1], highs[:, 1], mask.kv_len)
    keys, values = (_rows(cache, block_table)[:, :, : mask.kv_len] for cache in (k_cache, v_cache))
    # block_attn weighs values that nobody sees by 0, which a NaN survives.
    unseen = _unseen(begins.flatten(1), ends.flatten(1), mask.kv_len)[:, None, :, None]
    values = values.masked_fill(unseen, 0) if block_table is None else values.masked_fill_(unseen, 0)
    keys, values = keys.view(q.dtype), values.view(q.dtype)
    out, lse = block_attn(torch.cat([q, q], dim=2), keys, values, parts, scale=scale, softcap=softcap, return_lse=True)
    rows = q.shape[2]
    share = torch.sigmoid(lse[:, :, :rows] - lse[:, :, rows:]).nan_to_num(0.0).unsqueeze(-1)
    first, second = out.float().split(rows, dim=2)
    return torch.lerp(second, first, share).to(q.dtype)


def _rows(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """Keys or values ``[B, Hkv, S, D]`` as integers of eight bytes, which are faster to move. Pages are copied."""
    cache = cache.view(torch.int64)
    if block_table is None:
        return cache
    where = block_table.clamp(0, len(cache) - 1)
    return cache[where].reshape(len(where), -1, *cache.shape[2:]).transpose(1, 2)


def _unseen(begins: Tensor, ends: Tensor, kv_len: int) -> Tensor:
    """Which keys no row of an entry sees, bool ``[B or 1, kv_len]``, by the edges ``[B or 1, intervals]``."""
    opened = torch.zeros(len(begins), kv_len + 1, dtype=torch.int32, device=begins.device)
    for edges, step in ((begins, 1), (ends, -1)):
        opened.scatter_(1, edges.long(), step, reduce="add")
    return opened.cumsum(1, dtype=torch.int32)[:, :kv_len] == 0
