"""The keys and values of context features, written into the caches of all layers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_inject(
    features: Tensor,
    weight: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bias: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_plus_one: bool = False,
    norm_after_rope: bool = False,
    v_norm: bool = False,
    rope_interleaved: bool = False,
    slots: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Writes the keys and values of the context into the caches, in place; see ``dflash_ext.kv_inject``."""
    layers = len(k_caches)
    kv_heads, head_dim = k_caches[0].shape[1 if block_table is None else 2], k_caches[0].shape[-1]
    slots = positions if slots is None else slots
    with torch.autocast(features.device.type, enabled=False):
        real = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
        projected = features.to(real) @ weight.to(real).T
    if bias is not None:
        projected = projected + bias
    projected = projected.unflatten(-1, (layers, 2, kv_heads, head_dim))  # [B, S, L, 2, Hkv, D]
    b, s = (slots >= 0).nonzero(as_tuple=True)
    slot = slots[b, s].long()
    for layer in range(layers):
        k, v = projected[b, s, layer].unbind(1)  # [T, Hkv, D], T tokens
        gain = None
        if k_norm is not None:
            gain = k_norm[layer] + 1 if norm_plus_one else k_norm[layer]
        if gain is not None and not norm_after_rope:
            k = _rms_norm(k, norm_eps) * gain
        table = (cos, sin) if cos.dim() == 2 else (cos[layer], sin[layer])
        k = _rope(k, *(t[positions[b, s].long()][:, None] for t in table), rope_interleaved)
        if gain is not None and norm_after_rope:
            k = _rms_norm(k, norm_eps) * gain
        if v_norm:
            v = _rms_norm(v, norm_eps)
        for cache, new in ((k_caches[layer], k), (v_caches[layer], v)):
            if block_table is None:
                cache[b, :, slot] = new.to(cache.dtype)
            else:
                page_size = cache.shape[1]
                cache[block_table[b, slot // page_size].long(), slot % page_size] = new.to(cache.dtype)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first 2 * R entries of the last dimension by R angles, whose cos and sin are [..., R]."""
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)
