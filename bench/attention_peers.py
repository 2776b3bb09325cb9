"""Whoever computes the same attention on the GPU: each peer makes, for one case, a function of (q, k, v)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from dflash_ext import IntervalMask, block_attn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dflash_ext(mask: IntervalMask, q: Tensor, k: Tensor) -> Attention:
    planned = mask.plan(q.shape[1], k.shape[1], q.shape[3])
    return lambda q, k, v: block_attn(q, k, v, planned)


def flex(mask: IntervalMask, q: Tensor, k: Tensor, **options) -> Attention:
    torch._dynamo.reset()
    blocks, compiled = mask.to_flex(), torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True, kernel_options=options or None)


def flex_flash(mask: IntervalMask, q: Tensor, k: Tensor) -> Attention:
    return flex(mask, q, k, BACKEND="FLASH")


def sdpa(backend: SDPBackend, *, causal: bool = False):
    """PyTorch's attention with the dense mask; or causal, which is another problem and a reference speed."""

    def make(mask: IntervalMask, q: Tensor, k: Tensor) -> Attention:
        options = {"is_causal": True} if causal else {"attn_mask": mask.to_bool()}
        group = q.shape[1] // k.shape[1]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        # With a mask and enable_gqa together only the slowest backend is left, so heads are repeated beforehand.
        return lambda q, k, v: attend(q, *(x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v)))

    return make


PEERS = {
    "dflash_ext": dflash_ext,
    "flex": flex,
    "sdpa efficient, dense mask": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn, dense mask": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa math, dense mask": sdpa(SDPBackend.MATH),
}
if importlib.util.find_spec("flash_attn"):
    PEERS["flex FLASH"] = flex_flash

# Causal attention of the same shape, a speed to look at and no peer.
CAUSAL = {
    "causal sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION, causal=True),
    "causal sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, causal=True),
}
