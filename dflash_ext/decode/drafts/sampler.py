"""Refines drafted rows one after the other, each by the token before it."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from ...models import Target
from ...models.lora import SamplerHead
from ...reference.numerics import softcapped

CANDIDATES = 16  # of a row, the likeliest ones


class CandidateSampler:
    """Scores the likeliest candidates of a row anew, with a sampler head in the target's dtype.

    All other tokens are left out of the draft. Any q is lawful, as long as the tokens are drawn from it.
    """

    def __init__(self, head: SamplerHead, target: Target):
        self.target = target
        self.refine = deepcopy(head).to(target.device, target.dtype).requires_grad_(False)

    def candidates(self, logits: Tensor) -> Tensor:
        """The likeliest tokens of each row: [B, K, V] to int64 [B, K, n]."""
        return logits.topk(min(CANDIDATES, logits.shape[-1])).indices

    def scores(self, logits: Tensor, hidden: Tensor, candidates: Tensor, before: Tensor) -> Tensor:
        """The new logits [B, V] of one row, -inf for all tokens but its candidates.

        Args:
            logits: [B, V], those of the row itself. A candidate that they forbid (-inf) stays forbidden.
            hidden: [B, H], to which the model applies its head.
            candidates: int64 [B, n]. before: int64 [B], the token before the row.
        """
        refined = self.refine(hidden, self.target.model.get_input_embeddings()(before))
        scores = torch.bmm(self.target.head[candidates], refined[:, :, None])[..., 0]
        scores = softcapped(scores, self.target.softcap).to(logits.dtype)
        scores = scores.masked_fill(logits.gather(1, candidates) == -torch.inf, -torch.inf)
        return torch.full_like(logits, -torch.inf).scatter_(1, candidates, scores)
