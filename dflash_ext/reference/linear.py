"""Linear layers with the norm before them and the gate or residual after them, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import widened


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_plus_one: bool = False,
    gate: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T`` with an RMS norm before it and a gate and a residual after it; see ``dflash_ext.linear``."""
    wide = widened(x)
    if norm is not None:
        gain = widened(norm) + 1 if norm_plus_one else widened(norm)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps) * gain
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(wide, widened(weight), None if bias is None else widened(bias))
    if gate is not None:
        first, second = y.chunk(2, dim=-1)
        y = (F.silu(first) if gate == "silu" else F.gelu(first, approximate="tanh")) * second
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)
