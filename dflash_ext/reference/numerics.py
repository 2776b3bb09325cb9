"""What the definitions share: precision, NaN, softcaps and entropies."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it has that dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_nan(x: Tensor) -> Tensor:
    """``x`` with -inf in the place of NaN."""
    return x.masked_fill(x.isnan(), -math.inf)


def softcapped(x: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(x / softcap)``, or ``x`` if the softcap is None or 0."""
    return softcap * torch.tanh(x / softcap) if softcap else x


def entropy_of(logp: Tensor) -> Tensor:
    """The entropy in nats of log-probabilities over the last dimension, some of which may be -inf."""
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def per_row(value: float | Tensor | None, rows: Tensor) -> Tensor | None:
    """A number, or one number per row, as something that broadcasts against ``rows [N, V]``."""
    if value is None:
        return None
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.to(dtype).reshape(-1, 1)
    return torch.full((1, 1), value, dtype=dtype, device=rows.device)
