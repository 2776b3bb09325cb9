"""A denoiser of uniform noise as a drafter: short canvases, which the base verifies."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import Denoiser, Target
from ...ops import soft_embedding
from ...ops.cycle import CycleRows
from ..drafts.base import Draft
from ..drafts.uniform import next_block, noise, places_of
from ..drafts.waiting import WaitingTokens, places_from
from ..kv_cache import MOST_ROWS
from .forward import CausalForward


class CanvasDraft(Draft):
    """Drafts canvases with a denoiser, which has a cache of its own.

    A canvas stands behind the anchor and starts from random tokens. Every step reads what the one before was sure of
    (`next_block`), and is conditioned on what that expected. With several steps a token depends on those behind it,
    too, so that such a draft is a point mass, and the likeliest one.

    Args:
        denoiser: of uniform noise. A denoiser of masked diffusion is a LoRA drafter.
        width, steps, greedy: as in `Draft`.
        slots, tokens: the number of rows, and the largest number of tokens in a row, as in `KVCache`.

    Raises:
        ValueError: the denoiser has a mask token.
    """

    def __init__(self, denoiser: Denoiser, target: Target, *, slots: int, tokens: int, **options):
        if denoiser.mask_id is not None:
            raise ValueError(
                "a denoiser with a mask token drafts as the LoRA drafter in its folder; one with full weights has none"
            )
        super().__init__(target, **options)
        self.forward = CausalForward(denoiser, slots=slots, tokens=tokens, rows=MOST_ROWS)
        self.cache = self.forward.forward.cache
        self.unread = WaitingTokens(slots, self.width + 1, target.device)

    def inject(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Reads a part of a prompt."""
        counts, start = (positions >= 0).sum(dim=1), positions[:, 0].clamp(min=0)
        self.forward.encode(tokens, positions, start, counts, slots)
        self.unread.drop(slots)

    def commit(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Keeps the tokens for the next draft. A cycle without a draft, of one token, has those before it read."""
        if tokens.shape[1] == 1:
            self._read(slots, positions[:, 0], positions[:, 0] >= 0)
        self.unread.keep(tokens, positions, slots)

    def draft(
        self, rows: CycleRows, width: int, filters: dict[str, Tensor], changes: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        active, places = rows.active.bool(), places_of(rows, width)
        self._read(rows.slots, rows.start, active, rows.anchor)
        where = torch.where(active[:, None], places, -1), places[:, 0], rows.active * width, rows.slots
        tokens, like = noise(rows, width, self.target.vocab_size), self.forward.like
        soft = torch.zeros(*tokens.shape, like.shape[1], dtype=like.dtype, device=like.device)
        for step in range(1, self.steps + 1):
            logits = self.forward.denoise(tokens, *where, soft)
            if step < self.steps:
                soft = self.forward.condition(soft_embedding(logits, like))
                tokens = next_block(rows, logits, step)
        known = filters if self.steps == 1 else {}
        return self.draw(logits, None, rows.anchor, rows.seed, places[:, 0], known, changes)

    def block_len(self, width: int) -> int:
        return width + 1 if width else 0

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)
        self.unread.counts[slot] = 0

    def _read(self, slots: Tensor, start: Tensor, live: Tensor, anchor: Tensor | None = None) -> None:
        """Reads what is yet to be read of the tokens before `start` (int64 [B]), and the anchor, if given.

        live: bool [B], the rows that read something.
        """
        tokens, counts = self.unread.of(slots)
        first = (start - counts).clamp(min=0)
        if anchor is not None:
            tokens = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, counts[:, None], anchor[:, None])
            counts = counts + 1
        counts = counts * live
        positions = places_from(first, counts, tokens.shape[1])
        self.forward.encode(tokens, positions, first, counts, slots)
