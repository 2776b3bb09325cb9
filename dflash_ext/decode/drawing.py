"""How tokens are drawn from logits: greedily or by chance, under filters, penalties and a bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import sample
from .request import Request
from .state import FILTERS, PENALTIES

TABLES = ("token_counts", "logit_bias")  # of all slots, which rows of logits reach by their `table_rows`


@dataclass(frozen=True)
class Drawing:
    """What some rows need for their draws. A cycle computes the same for all of its rows.

    filters: the temperature and the filters that some row uses. Without any, decoding is greedy.
    changes: the penalties that some row uses, and "logit_bias" if some row has one.
    """

    filters: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Drawing:
        used = frozenset().union(*[request.uses for request in requests])
        filters = tuple(name for name in FILTERS if name in used) if "temperature" in used else ()
        return cls(filters, tuple(name for name in (*PENALTIES, "logit_bias") if name in used))


def draw(
    logits: Tensor, seed: Tensor, first: Tensor, filters: dict[str, Tensor], changes: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws the tokens [B, K] from logits [B, K, V], and what `verify` must know of the draw.

    seed: int64 [B]. first: int64 [B], the position of the first of the tokens. A seed belongs to a row and a position,
    so that a row's draws do not depend on the other rows. filters, changes: what `State.options_of` and
    `State.changes_of` give for these rows. Without filters the draw is greedy. `verify` does not know how a draft's
    logits were changed, so a sampled draft must have no changes.
    """
    if not filters and not changes:
        return logits.argmax(dim=-1), {}
    count = logits.shape[1]
    positions = first[:, None] + torch.arange(count, device=first.device)
    options = {"temperature": 0.0} | filters | changes
    options = {
        name: value.repeat_interleave(count) if isinstance(value, Tensor) and name not in TABLES else value
        for name, value in options.items()
    }
    drawn = sample(logits.flatten(0, 1), (seed[:, None] + positions).flatten(), **options)
    tokens = drawn.token.view(positions.shape)
    if not filters:
        return tokens, {}
    pivot, normaliser = (x.view(positions.shape) for x in (drawn.pivot, drawn.normaliser))
    return tokens, {"draft_logits": logits, "draft_pivot": pivot, "draft_normaliser": normaliser}
