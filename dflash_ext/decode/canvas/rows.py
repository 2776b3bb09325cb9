"""What the canvas loop knows of each row, as tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Rows:
    """Rows of canvases, ``[N]`` or ``[N, L]`` each. A denoising step reads and replaces them, and no host value.

    canvas: int64 [N, L], the tokens that the next forward reads.
    best: int64 [N, L], what would be committed now; -1 before the first step.
    masked: bool [N, L], the positions that have no token yet (masked diffusion).
    accepted: bool [N, L], the positions that the last step took over.
    length: int64 [N], the positions of the canvas that exist; 0 for a row of padding.
    total: int64 [N], how many positions were masked before the first step.
    start: int64 [N], the tokens before the canvas, all of which are in the cache.
    step: int64 [N], the steps that were made on this canvas.
    stable: int64 [N], for how many steps `best` has stayed the same.
    running: bool [N], whether the canvas needs more steps.
    finite: bool [N], whether all logits of the canvas were finite so far.
    seed: int64 [N], as `derived` makes them of the seeds that were given.
    soft: [N, L, H], the expected embeddings that the last step gave; None without self-conditioning.
    """

    canvas: Tensor
    best: Tensor
    masked: Tensor
    accepted: Tensor
    length: Tensor
    total: Tensor
    start: Tensor
    step: Tensor
    stable: Tensor
    running: Tensor
    finite: Tensor
    seed: Tensor
    soft: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, length: int, device: torch.device, soft: Tensor | None = None) -> Rows:
        numbers = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(6)]
        canvas = torch.zeros(rows, length, dtype=torch.int64, device=device)
        flags = torch.zeros(rows, length, dtype=torch.bool, device=device)
        length, total, start, step, stable, seed = numbers
        running = torch.zeros(rows, dtype=torch.bool, device=device)
        by_position = canvas, canvas.clone(), flags, flags.clone()
        return cls(*by_position, length, total, start, step, stable, running, running.clone(), seed, soft)

    @property
    def live(self) -> Tensor:
        """bool [N, L]: the positions that exist."""
        return torch.arange(self.canvas.shape[1], device=self.canvas.device) < self.length[:, None]

    @property
    def positions(self) -> Tensor:
        """int64 [N, L]: the positions of the canvas in the whole row."""
        return self.start[:, None] + torch.arange(self.canvas.shape[1], device=self.canvas.device)

    def take(self, slots: Tensor) -> Rows:
        """The rows in these slots (int64 [n])."""
        return self._each(lambda tensor: tensor.index_select(0, slots))

    @contextmanager
    def changing(self, slots: Tensor) -> Iterator[Rows]:
        """The rows in these slots (int64 [n]). At its end, the tensors that have been replaced are written back."""
        rows = self.take(slots)
        before = replace(rows)
        yield rows
        for field in fields(self):
            new = getattr(rows, field.name)
            if new is not getattr(before, field.name):
                getattr(self, field.name).index_copy_(0, slots, new)

    def _each(self, function) -> Rows:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(tensor) for name, tensor in given.items() if tensor is not None})
