"""The figures that the log of a training has beside the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .losses import Losses


class Meter(Protocol):
    """Collects batches between two entries of the log. Its figure is a quotient, so that ranks can be added up.

    Attributes:
        name: that of the figure in the log.
    """

    name: str

    def add(self, batch: Mapping[str, Tensor], result: Losses) -> None:
        """Adds a batch; nothing waits for the device."""

    def take(self) -> Tensor:
        """The dividend and the divisor over the batches since the last call: float64 [2] on the CPU."""


class Accuracy:
    """The share of the labels that are the most probable token."""

    name = "accuracy"

    def __init__(self):
        self._counts: list[Tensor] = []

    def add(self, batch: Mapping[str, Tensor], result: Losses) -> None:
        self._counts.append(torch.stack([(result.correct & result.counts).sum(), result.counts.sum()]))

    def take(self) -> Tensor:
        total = torch.stack(self._counts).sum(dim=0) if self._counts else torch.zeros(2)
        self._counts.clear()
        return total.cpu().double()
