"""What stands between the matrix products of a layer, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import widened


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * widened(weight)).to(x.dtype)


def rotate_heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = rms_norm(widened(x), weight, eps).chunk(2, dim=-1)
    cos, sin = (widened(table)[..., None, :half] for table in (cos, sin))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def gated_pair(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, activation: str) -> Tensor:
    return F.linear(gated_pair(gate, up, activation), weight)
