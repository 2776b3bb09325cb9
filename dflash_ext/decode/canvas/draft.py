"""A denoiser of uniform noise as a drafter: short canvases, which the base verifies."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import Denoiser, Target
from ...ops import soft_embedding
from ...ops.cycle import CycleRows
from ..drafts.backlog import UnreadTokens
from ..drafts.base import Draft
from ..drafts.uniform import next_block, noise, places_of
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
        self.backlog = UnreadTokens(slots, tokens, self.width + 1, target.device)

    def inject(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Reads tokens."""
        counts, start = (positions >= 0).sum(dim=1), positions[:, 0].clamp(min=0)
        self.forward.encode(tokens, positions, start, counts, slots)

    def commit(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        self.backlog.keep(tokens[..., None], positions, slots)

    def draft(
        self, rows: CycleRows, width: int, filters: dict[str, Tensor], changes: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        active, places = rows.active.bool(), places_of(rows, width)
        self._read_to_anchors(rows)
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

    def _read_to_anchors(self, rows: CycleRows) -> None:
        """Reads what waits, and the anchors behind it."""
        self.backlog.keep(rows.anchor[:, None, None], rows.positions[:, :1].contiguous(), rows.slots)
        end, counts = rows.start + 1, (self.backlog.waiting(rows) + 1) * rows.active
        tokens, _, positions = self.backlog.take(end, counts, rows.slots, self.backlog.room + 1)
        self.forward.encode(tokens, positions, end - counts, counts, rows.slots)
        self.backlog.mark(rows)
