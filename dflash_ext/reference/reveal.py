"""The choice of the positions of a canvas to commit, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .numerics import per_row, widened, without_nan


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
    """Chooses which masked positions of a canvas to commit; see ``dflash_ext.reveal`` for the limits."""
    rule, limit = reveal_limit(
        scores,
        entropy,
        count=count,
        threshold=threshold,
        at_least=at_least,
        factor=factor,
        entropy_bound=entropy_bound,
    )
    if scores is None:
        scores = torch.zeros(masked.shape, device=masked.device)
    limit = per_row(limit, masked)

    # Every limit takes a prefix of the masked positions in falling order of score.
    scores = without_nan(widened(scores))
    ranked = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~masked, -math.inf)
    confidence, order = ranked.sort(dim=-1, descending=True, stable=True)
    nth = torch.arange(1, masked.shape[-1] + 1, device=masked.device)
    if rule == "count":
        taken = nth <= limit
    elif rule == "threshold":
        taken = (confidence > limit) | (nth == 1)
    elif rule == "at_least":
        taken = (confidence >= limit) | (nth == 1)
    elif rule == "factor":
        taken = (confidence >= 1 - limit / (nth + 1)).cumprod(-1).bool() | (nth == 1)
    else:
        h = widened(entropy).masked_fill(~masked, 0.0).gather(-1, order)
        taken = (h.cumsum(-1) - h.cummax(-1).values <= limit) | (nth == 1)
    return torch.zeros_like(masked).scatter(-1, order, taken.expand_as(masked)) & masked


def reveal_limit(
    scores: Tensor | None, entropy: Tensor | None, **limits: float | Tensor | None
) -> tuple[str, float | Tensor]:
    """The name and the value of the one limit that is given to ``reveal``.

    Raises ValueError unless exactly one is given, with the scores or the entropy that it needs.
    """
    given = [name for name, limit in limits.items() if limit is not None]
    if len(given) != 1:
        raise ValueError(
            f"reveal: {', '.join(given) or 'no limit'} given; exactly one of {', '.join(limits)} is needed"
        )
    rule = given[0]
    if rule == "entropy_bound" and entropy is None:
        raise ValueError("reveal: entropy_bound needs entropy")
    if rule in ("threshold", "at_least", "factor") and scores is None:
        raise ValueError(f"reveal: {rule} needs scores, the confidence of each position")
    return rule, limits[rule]


def reveal_count(total: Tensor, step: int | Tensor, steps: int, *, schedule: str = "linear") -> Tensor:
    """The number of positions to commit in one step; see ``dflash_ext.reveal_count``."""
    if schedule not in ("linear", "cosine"):
        raise ValueError(f"reveal_count: schedule is {schedule!r}; 'linear' and 'cosine' are supported")
    if not isinstance(step, Tensor):
        if not 0 <= step < steps or step % 1:
            raise ValueError(f"reveal_count: step is {step}; 0 to {steps - 1} are the steps")
        step = torch.full((), step, device=total.device)
    if schedule == "linear":
        count = total // steps + (step < total % steps)
    else:
        # In floating point, the cosine of half of pi may be below 0.
        shares = (torch.cos(math.pi * s.double() / (2 * steps)).clamp(min=0) for s in (step, step + 1))
        before, after = ((total * share).floor() for share in shares)
        count = before - after
    return torch.where((step >= 0) & (step < steps), count, 0).to(total.dtype)
