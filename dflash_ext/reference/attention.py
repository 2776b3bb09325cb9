"""Attention under an IntervalMask, and against a cache, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..masks import IntervalMask
from .numerics import softcapped, widened


def block_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under an IntervalMask; see ``dflash_ext.block_attn`` for shapes."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask.to_bool()
    empty = ~visible.any(-1, keepdim=True)
    with torch.autocast(q.device.type, enabled=False):
        # All query heads of one key head are rows of the same product.
        grouped = widened(q).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
        scores = (grouped @ widened(k).mT * scale).unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
        scores = softcapped(scores, softcap)
        # An empty row is computed from zeros and then overwritten, which keeps NaN out of its gradients.
        scores = scores.masked_fill(~visible, -math.inf).masked_fill(empty, 0.0)
        probs = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
        # 0 * NaN is NaN: a value that is not finite reaches the rows that see it, and no other.
        values = widened(v)
        broken = ~values.isfinite()
        reached = visible.to(values.dtype) @ broken.to(values.dtype) > 0
        out = probs.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ values.masked_fill(broken, 0.0)
    out = out.unflatten(2, (heads // kv_heads, -1)).masked_fill(reached.unsqueeze(2), math.nan)
    out = out.flatten(1, 2).to(q.dtype)
    if not return_lse:
        return out
    return out, torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -math.inf)


def block_attn_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: IntervalMask,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention against a cache; see ``dflash_ext.block_attn_decode`` for shapes."""
    caches = []
    for cache in (k_cache, v_cache):
        if block_table is not None:
            pages = cache[block_table.clamp(min=0).long()]  # [B, max_pages, page_size, Hkv, D]
            cache = pages.flatten(1, 2).transpose(1, 2)
        caches.append(cache[:, :, : mask.kv_len])
    return block_attn(q, *caches, mask, scale=scale, softcap=softcap)
