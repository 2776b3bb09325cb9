"""The two functions of the canvas loop from state to state: a denoising step, and the change to the next canvas."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.random import derived
from .forward import CanvasForward
from .processes import MaskedDiffusion, UniformDiffusion
from .randomness import Randomness
from .rows import Rows


class CanvasCycle:
    """Steps of all rows' canvases, without host values.

    Args:
        slots: the number of rows; one more slot belongs to no row.
        length: that of a canvas.
    """

    def __init__(
        self,
        forward: CanvasForward,
        process: MaskedDiffusion | UniformDiffusion,
        randomness: Randomness,
        *,
        slots: int,
        length: int,
    ):
        self.forward, self.process, self.randomness = forward, process, randomness
        self.length, self.spare, self.device = length, slots, forward.like.device
        self.vocab_size, hidden_size = forward.like.shape
        soft = None
        if forward.self_conditions:
            soft = torch.zeros(slots + 1, length, hidden_size, dtype=forward.like.dtype, device=self.device)
        self.rows = Rows.empty(slots + 1, length, self.device, soft)
        self.changes = {"softcap": forward.softcap}
        if forward.mask_id is not None and forward.mask_id < self.vocab_size:
            bias = torch.zeros(self.vocab_size, dtype=torch.float32, device=self.device)
            bias[forward.mask_id] = -torch.inf  # a mask token is never drawn
            self.changes["logit_bias"] = bias

    def step(self, slots: Tensor) -> None:
        """One denoising step of the rows in these slots (int64 [n])."""
        with self.rows.changing(slots) as rows:
            logits = self.forward.denoise(rows.canvas, *self._placed(rows, slots), rows.soft)
            if not self.forward.self_conditions:
                self.process.step(rows, logits, self.changes, self.randomness)
                return
            running = rows.running
            expected = self.process.step(rows, logits, self.changes, self.randomness, self.forward.like)
            rows.soft = torch.where(running[:, None, None], self.forward.condition(expected), rows.soft)

    def extend(self, slots: Tensor) -> None:
        """Commits the canvases of these rows, whose tokens are in `rows.best`, and begins the next ones."""
        with self.rows.changing(slots) as rows:
            # A row of padding has no tokens, or mask tokens without an embedding.
            tokens = torch.where(rows.live, rows.best, 0)
            self.forward.commit(tokens, *self._placed(rows, slots))
            rows.start = rows.start + rows.length
            rows.length = torch.where(rows.length > 0, self.length, 0)
            self._begin(rows, slots)

    def admit(self, slots: Tensor, start: Tensor, seed: Tensor, canvas: Tensor | None, length: Tensor) -> None:
        """Begins the first canvases of new rows, whose prompts are in the cache: int64 [n] each, canvas [n, L].

        canvas: tokens to begin with instead of noise.
        """
        with self.rows.changing(slots) as rows:
            rows.start, rows.seed, rows.length = start, derived(seed, 0), length
            self._begin(rows, slots)
            if canvas is not None:
                rows.canvas = canvas
                self.process.begin_from(rows, self.forward.mask_id)

    def _begin(self, rows: Rows, slots: Tensor) -> None:
        self.process.begin(rows, self.forward.mask_id, self.vocab_size, self.randomness)
        if self.forward.first_guess:
            rows.canvas = self.forward.first_guess(rows, slots)

    def _placed(self, rows: Rows, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.where(rows.live, rows.positions, -1), rows.start, rows.length, slots.int()
