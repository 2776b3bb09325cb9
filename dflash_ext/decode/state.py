"""What the engine knows of each row, as tensors on the device: a cycle reads and writes them, and no host value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.cycle import FIELDS

OPTIONS = ("temperature", "top_k", "top_p", "min_p")
OFF = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class State:
    """The rows of all slots.

    numbers: int64 [slots + 1, 5], the columns being `ops.cycle.FIELDS`: the position of the anchor, which is also the
        number of tokens in the caches; the anchor, which is the last committed token and in no cache yet; the last
        position that the target reads, after which the row ends; whether the row is decoded; its seed.
    options: float32 [slots + 1, 4], the columns being OPTIONS.
    stops: int64 [slots + 1, n], the tokens that end a row, -1 for none.

    One more slot belongs to no row: it fills up what a graph decodes beyond the rows.
    """

    def __init__(self, slots: int, device: torch.device):
        self.spare = slots
        self.device = device
        self.numbers = torch.zeros(slots + 1, len(FIELDS), dtype=torch.int64, device=device)
        self.options = torch.zeros(slots + 1, len(OPTIONS), device=device)
        self.stops = torch.full((slots + 1, 1), -1, device=device)

    def options_of(self, slots: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the OPTIONS of the rows in these slots (int64 [B]), float32 [B] each."""
        if not names:
            return {}
        values = self.options.index_select(0, slots)
        return {name: values[:, OPTIONS.index(name)] for name in names}

    def admit(
        self,
        slots: Tensor,
        *,
        start: Sequence[int],
        last: Sequence[int],
        seed: Sequence[int],
        options: Sequence[dict[str, float]],
        stops: Sequence[Sequence[int]],
    ) -> None:
        """Puts new rows into these slots, inactive and without an anchor."""
        numbers = torch.tensor([start, [0] * len(start), last, [0] * len(start), seed]).T
        self.numbers[slots] = numbers.to(self.device, non_blocking=True)
        values = torch.tensor([[row[name] for name in OPTIONS] for row in options], dtype=torch.float32)
        self.options[slots] = values.to(self.device, non_blocking=True)
        width = self.stops.shape[1]
        padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in stops])
        self.stops[slots] = padded.to(self.device, non_blocking=True)

    def widen_stops(self, count: int) -> bool:
        """Makes room for rows with `count` stop tokens. Returns whether the tensor has been replaced."""
        missing = count - self.stops.shape[1]
        if missing > 0:
            self.stops = torch.nn.functional.pad(self.stops, (0, missing), value=-1)
        return missing > 0

    def set_anchors(self, slots: Tensor, anchors: Tensor, active: Tensor) -> None:
        """Gives admitted rows their first tokens, and says which of them go on."""
        self.numbers[slots, FIELDS.index("anchor")] = anchors
        self.numbers[slots, FIELDS.index("active")] = active.long()

    def freeze(self, slots: Tensor) -> None:
        """Ends rows from outside of a cycle."""
        self.numbers[slots, FIELDS.index("active")] = 0
