"""What the engine knows of each row, as tensors on the device: a cycle reads and writes them, and no host value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OPTIONS = ("temperature", "top_k", "top_p", "min_p")
OFF = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FIELDS = ("start", "anchor", "last", "active", "seed")


@dataclass(frozen=True)
class RowState:
    """The state of some rows, [B] each.

    start: int64, the position of the anchor, which is also the number of tokens in the caches.
    anchor: int64, the last committed token. No cache has it yet.
    last: int64, the last position that the target reads. The row ends with the token after it.
    active: bool. The caches of other rows are not written.
    seed: int64.
    options: temperature, top_k, top_p and min_p.
    stops: int64 [B, n], the tokens that end a row, -1 for none.
    """

    start: Tensor
    anchor: Tensor
    last: Tensor
    active: Tensor
    seed: Tensor
    options: dict[str, Tensor]
    stops: Tensor


class State:
    """The rows of all slots. One more slot belongs to no row: it fills up what a graph decodes beyond the rows."""

    def __init__(self, slots: int, device: torch.device):
        self.spare = slots
        self.device = device
        self.numbers = torch.zeros(slots + 1, len(FIELDS), dtype=torch.int64, device=device)
        self.options = torch.zeros(slots + 1, len(OPTIONS), device=device)
        self.stops = torch.full((slots + 1, 1), -1, device=device)

    def of(self, slots: Tensor) -> RowState:
        """The rows in these slots (int64 [B])."""
        fields = dict(zip(FIELDS, self.numbers.index_select(0, slots).unbind(1), strict=True))
        options = dict(zip(OPTIONS, self.options.index_select(0, slots).unbind(1), strict=True))
        fields["active"] = fields["active"].bool()
        return RowState(**fields, options=options, stops=self.stops.index_select(0, slots))

    def advance(self, slots: Tensor, rows: RowState, start: Tensor, anchor: Tensor, active: Tensor) -> None:
        """Writes what a cycle changes."""
        numbers = torch.stack([start, anchor, rows.last, active.long(), rows.seed], dim=1)
        self.numbers.index_copy_(0, slots, numbers)

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

    def freeze(self, slots: Tensor) -> None:
        """Ends rows from outside of a cycle."""
        self.numbers[slots, FIELDS.index("active")] = 0
