"""Whoever computes the same attention on the GPU: each makes, for a mask and inputs, the call that is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from dflash_ext import IntervalMask, block_attn

Call = Callable[[], Tensor]


def dflash_ext(mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Call:
    planned = mask.plan(q.shape[1], k.shape[1], q.shape[3])
    return lambda: block_attn(q, k, v, planned)


def flex(mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor, **options) -> Call:
    torch._dynamo.reset()
    blocks, compiled = mask.to_flex(), torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=True, kernel_options=options or None)


def flex_flash(mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Call:
    return flex(mask, q, k, v, BACKEND="FLASH")


def dense(backend: SDPBackend):
    """PyTorch's attention with the dense mask. Heads are repeated beforehand: with a mask, enable_gqa leaves only the
    slowest backend."""

    def make(mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Call:
        visible = mask.to_bool()
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

        return call

    return make


def causal(backend: SDPBackend):
    """PyTorch's causal attention: a peer where the mask is causal, elsewhere another problem and a reference speed."""

    def make(mask: IntervalMask, q: Tensor, k: Tensor, v: Tensor) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return call

    return make


PEERS = {
    "dflash_ext": dflash_ext,
    "flex": flex,
    "sdpa efficient, dense mask": dense(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn, dense mask": dense(SDPBackend.CUDNN_ATTENTION),
    "sdpa math, dense mask": dense(SDPBackend.MATH),
}
if importlib.util.find_spec("flash_attn"):
    PEERS["flex FLASH"] = flex_flash

# Of the same shape.
CAUSAL = {
    "causal sdpa flash": causal(SDPBackend.FLASH_ATTENTION),
    "causal sdpa cudnn": causal(SDPBackend.CUDNN_ATTENTION),
}
