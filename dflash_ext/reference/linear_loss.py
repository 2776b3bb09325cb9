"""Cross-entropy of hidden states and a vocabulary head in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .loss import CrossEntropy, masked_cross_entropy, weight_of
from .numerics import softcapped, widened


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    max_rows: int | None = None,
    ignore_index: int | None = -100,
    teacher: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_row: Tensor | None = None,
    teacher_softcap: float | None = None,
    **options,
) -> CrossEntropy:
    """``masked_cross_entropy`` of ``hidden @ head.T``; see ``dflash_ext.linear_cross_entropy``."""
    counts = weight_of(target, weight, ignore_index) != 0
    kept = int(counts.sum())
    if max_rows is not None and kept > max_rows:
        raise ValueError(f"linear_cross_entropy: {kept} rows have a weight, more than max_rows = {max_rows}")
    with torch.autocast(hidden.device.type, enabled=False):
        logits = widened(hidden) @ widened(head).T
        if teacher_hidden is not None:
            if teacher_row is not None:
                teacher_hidden = teacher_hidden.flatten(0, -2)[teacher_row.long().where(counts, 0)]
            teacher = (widened(teacher_hidden) @ widened(teacher_head).T).detach()
            teacher = softcapped(teacher, teacher_softcap)
    return masked_cross_entropy(logits, target, weight, ignore_index=ignore_index, teacher=teacher, **options)
