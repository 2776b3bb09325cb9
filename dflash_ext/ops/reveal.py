"""Choosing which positions of a canvas to commit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_tensors, shown
from ..native import load
from .logits import LOGITS_DTYPES, as_contiguous, by_row, number_and_tensor

load()
_native = torch.ops.dflash_ext

# The native operator takes an index into this.
_RULES = ("count", "threshold", "factor", "entropy_bound", "at_least")


def reveal(
    scores: Tensor | None,
    masked: Tensor,
    *,
    count: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    at_least: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """Chooses which masked positions of a canvas to commit in this step of diffusion.

    The masked positions are taken in falling order of score (left to right among equals) until the limit is reached.
    Scores may be the confidence (max p, or the probability of the drawn token, which ``sample`` returns on request),
    the margin (p1 - p2), or -H for the order of entropy. Without scores the order is left to right. A score that is NaN
    counts as -inf, so that it comes last. An entropy that is NaN exceeds any bound.

    Args:
        scores: ``[B, L]``, or None.
        masked: bool ``[B, L]``: the positions that may be committed.
        count: takes this number of positions, or all if fewer are left (``reveal_count`` has linear and cosine
            schedules).
        threshold: takes positions with score > threshold (SDAR); scores are confidences.
        at_least: takes positions with score >= at_least (Fast-dLLM); scores are confidences.
        factor: takes the n-th position while its confidence >= 1 - factor / (n + 1) (dInfer); scores are confidences.
        entropy_bound: takes the longest prefix whose ``sum(H) - max(H)`` is at most the bound (arXiv 2505.24857). With
            scores of -H and every position masked, this is also the acceptance rule of uniform-state diffusion.
        entropy: ``[B, L]``, H in nats, for entropy_bound.

    A limit is a number, or a tensor of no dimensions or ``[B]``. All limits but count take at least one position of a
    row that has any. A limit of NaN in a tensor takes no more than that.

    Returns:
        bool ``[B, L]``, the positions to commit, all of them masked.

    Raises ValueError unless exactly one limit is given, with the scores or the entropy that it needs, and for arguments
    that do not fit together; TypeError for one of another type.
    """
    limits = {
        "count": count,
        "threshold": threshold,
        "at_least": at_least,
        "factor": factor,
        "entropy_bound": entropy_bound,
    }
    reals = {"scores": scores, "entropy": entropy}
    check_tensors("reveal", masked=masked, optional=reals, numbers=limits)
    if masked.dim() != 2 or masked.dtype != torch.bool:
        raise ValueError(f"reveal: masked is {masked.dtype} {list(masked.shape)}; bool [B, L] is needed")
    for name, given in reals.items():
        if given is not None and (given.shape != masked.shape or given.dtype not in LOGITS_DTYPES):
            raise ValueError(f"reveal: {name} is {shown(given)}; floating {list(masked.shape)} is needed")
    limits = by_row("reveal", masked.shape[:1], **limits)
    rule, limit = reference.reveal_limit(scores, entropy, **limits)
    real = torch.float32
    for given in reals.values():
        real = real if given is None else torch.promote_types(real, given.dtype)
    return _native.reveal(
        as_contiguous(scores, real),
        masked.contiguous(),
        as_contiguous(entropy, real),
        _RULES.index(rule),
        *number_and_tensor(limit, 0.0, real),
    )


def reveal_count(total: Tensor, step: int | Tensor, steps: int, *, schedule: str = "linear") -> Tensor:
    """The number of positions to commit in step ``step`` (from 0) of ``steps``, for ``reveal``'s count.

    Args:
        total: int ``[B]``, the number of positions that were masked before the first step.
        step: an int; or an int tensor ``[]`` or ``[B]`` on total's device, so that one captured graph serves all steps.
            A tensor's values are not read on the host: a step out of range has the count 0.
        schedule: "linear" gives equal shares, and the remainder to the first steps. With "cosine", a fraction
            cos(pi s / 2 steps) of the positions, rounded down, is still masked after s steps (MaskGIT, arXiv
            2202.04200).

    Returns:
        int ``[B]``. The counts of all steps add up to total.

    Raises ValueError for an int step out of range or an unknown schedule, TypeError for an argument of another type.
    """
    check_tensors("reveal_count", total=total, numbers={"step": step})
    return reference.reveal_count(total, step, steps, schedule=schedule)


@torch.library.register_fake("dflash_ext::reveal")
def _(scores, masked, *others):
    return masked.new_empty(masked.shape)
