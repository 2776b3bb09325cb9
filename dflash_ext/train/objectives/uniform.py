"""The objective of uniform-state denoising (DiffusionGemma): all tokens of noised blocks, right and wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models.uniform import UniformAdaptation
from ..losses import Losses
from .denoising import DenoisingObjective


class UniformObjective(DenoisingObjective):
    """The losses of a denoiser on a batch of ``UniformCollator``: [B, S].

    A denoiser reads some random tokens among the right ones of a block, and must tell which they are: every token of a
    block counts. Rows that the batch has chosen are read twice, without a gradient at first, and their second pass is
    conditioned on what the first one expects.

    Args: as those of `DenoisingObjective`, without the divergence from the base.
    """

    def __init__(self, adaptation: UniformAdaptation, *, ar_weight: float = 0.0):
        super().__init__(adaptation, ar_weight=ar_weight)
        self.waits = True  # for the number of tokens in blocks

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"noise": "uniform"}

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        ids, block = batch["input_ids"], batch["hidden"]
        inputs = self.adaptation.inputs(batch)
        conditioned = batch["conditioned"][:, None] & block
        with torch.no_grad():
            soft = self._expected(inputs, conditioned)
        states = self.adaptation.conditioned(soft, *inputs)
        result = self._cross_entropy(states[:, : ids.shape[1]], ids, batch["weights"])
        losses = result.loss
        if self.ar_weight:
            losses = losses + self._next_tokens(states[:, -ids.shape[1] :], batch)
        return Losses(losses, block, result.correct)

    def _expected(self, inputs: tuple, rows: Tensor) -> Tensor:
        """What the first pass expects at these rows of blocks; a row's right copy behind them gets zeros."""
        states = self.adaptation.conditioned(None, *inputs)
        behind = rows.new_zeros(rows.shape[0], states.shape[1] - rows.shape[1])
        return self.adaptation.expected(states, torch.cat([rows, behind], dim=1))
