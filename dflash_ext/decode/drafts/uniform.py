"""What drafts of uniform noise start from, and what they keep from step to step, as DiffusionGemma's canvases do."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import reveal, sample
from ...ops.cycle import CycleRows
from ...ops.random import derived, uniform_tokens

ENTROPY_BOUND = 0.1  # in nats: DiffusionGemma's


def places_of(rows: CycleRows, width: int) -> Tensor:
    """The positions behind the anchors, int64 [B, width]."""
    return rows.start[:, None] + 1 + torch.arange(width, device=rows.start.device)


def noise(rows: CycleRows, width: int, vocab_size: int, step: int = 0) -> Tensor:
    """Random tokens for the positions behind the anchors: int64 [B, width], by seed, position and step."""
    return uniform_tokens(derived(rows.seed, step)[:, None] + places_of(rows, width), vocab_size)


def next_block(rows: CycleRows, logits: Tensor, step: int) -> Tensor:
    """What a step reads, given the logits [B, K, V] of the one before: int64 [B, K].

    The likeliest token of the positions of the least entropy, while the entropies before them add up to at most the
    bound, and new random tokens elsewhere. Training never shows a block of likely but wrong tokens.
    """
    drawn = sample(logits, 0)
    live = torch.ones(drawn.entropy.shape, dtype=torch.bool, device=logits.device)
    kept = reveal(-drawn.entropy, live, entropy=drawn.entropy, entropy_bound=ENTROPY_BOUND)
    return torch.where(kept, drawn.argmax, noise(rows, logits.shape[1], logits.shape[2], step))
