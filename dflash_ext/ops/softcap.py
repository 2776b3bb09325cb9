"""Logits under a soft cap."""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import load
from ..reference.numerics import softcapped, widened

load()
_native = torch.ops.dflash_ext


def softcapped_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``, computed in float32 or float64; no gradient.

    Gemma's heads end so. bfloat16 would round such logits a second time, and float32 takes twice the memory. On a GPU,
    logits of both half precisions become float16 in their own memory, whose 11 bits hold a number below 32 to 0.008.
    Those of a CPU become float32.

    Args:
        logits: floating, contiguous. They are overwritten on a GPU.
        softcap: at most 60,000, which float16 can hold. None or 0 returns the logits as they are.
    """
    if not softcap:
        return logits
    if not logits.is_cuda or logits.dtype == torch.float64:
        return softcapped(widened(logits), softcap)
    _native.softcap_(logits, softcap)
    return logits if logits.dtype == torch.float32 else logits.view(torch.float16)


@torch.library.register_fake("dflash_ext::softcap_")
def _(logits, softcap):
    return None
