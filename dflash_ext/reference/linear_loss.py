"""Cross-entropy of hidden states and a vocabulary head in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .loss import CrossEntropy, masked_cross_entropy, weight_of
from .numerics import widened


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    max_rows: int | None = None,
    ignore_index: int | None = -100,
    **options,
) -> CrossEntropy:
    """``masked_cross_entropy`` of ``hidden @ head.T``; see ``dflash_ext.linear_cross_entropy``."""
    kept = int((weight_of(target, weight, ignore_index) != 0).sum())
    if max_rows is not None and kept > max_rows:
        raise ValueError(f"linear_cross_entropy: {kept} rows have a weight, more than max_rows = {max_rows}")
    with torch.autocast(hidden.device.type, enabled=False):
        logits = widened(hidden) @ widened(head).T
    return masked_cross_entropy(logits, target, weight, ignore_index=ignore_index, **options)
