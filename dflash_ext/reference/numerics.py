"""How the definitions treat precision and numbers that are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_nan(x: Tensor) -> Tensor:
    """With -inf in the place of NaN."""
    return x.masked_fill(x.isnan(), -math.inf)


def entropy_of(logp: Tensor) -> Tensor:
    """In nats, of log-probabilities over the last dimension, of which some may be -inf."""
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
