"""Implementations of attention on the GPU. Each one makes the function of q, k, v that is timed for a pattern."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.cases import Case, Pattern
from dflash_ext import block_attn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# This lets a compiled peer's backward run several times after one forward.
torch._functorch.config.donated_buffer = False


def dflash_ext(case: Case, pattern: Pattern, deterministic: bool = False) -> Attend:
    planned = pattern.mask.plan(case.heads, case.kv_heads, case.head_dim)
    return lambda q, k, v: block_attn(q, k, v, planned, deterministic=deterministic)


def flex(case: Case, pattern: Pattern, **options) -> Attend:
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = create_block_mask(
        pattern.mask_mod, None, None, pattern.mask.q_len, pattern.mask.kv_len, device="cuda", BLOCK_SIZE=128
    )
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True, kernel_options=options or None)


def flex_flash(case: Case, pattern: Pattern) -> Attend:
    return flex(case, pattern, BACKEND="FLASH")


def flash_attention_4(case: Case, pattern: Pattern) -> Attend:
    from bench.flash_attention_4 import attention

    return attention(pattern, case.head_dim)


def dense(backend: SDPBackend) -> Callable[[Case, Pattern], Attend]:
    """PyTorch's attention with the dense mask.

    Key heads are repeated inside the call, because only PyTorch's slowest backend takes enable_gqa with a mask.
    """

    def make(case: Case, pattern: Pattern) -> Attend:
        visible = pattern.mask.to_bool()
        group = case.heads // case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

        return attend

    return make


def causal(backend: SDPBackend) -> Callable[[Case, Pattern], Attend]:
    """PyTorch's causal attention. If the mask is not causal, it solves another problem and shows a reference speed."""

    def make(case: Case, pattern: Pattern) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return attend

    return make


OURS, DETERMINISTIC = "dflash_ext", "dflash_ext, deterministic"
PEERS = {OURS: dflash_ext, DETERMINISTIC: partial(dflash_ext, deterministic=True), "flex": flex}
if importlib.util.find_spec("flash_attn"):
    PEERS |= {"flex FLASH": flex_flash, "flash-attn-4": flash_attention_4}

# Nobody who knows FlexAttention would choose a dense mask, so these do not count in the ratio to the best peer.
DENSE = {
    "sdpa efficient, dense mask": dense(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn, dense mask": dense(SDPBackend.CUDNN_ATTENTION),
}

# Causal attention of the same shape.
CAUSAL = {
    "causal sdpa flash": causal(SDPBackend.FLASH_ATTENTION),
    "causal sdpa cudnn": causal(SDPBackend.CUDNN_ATTENTION),
}
