"""What plain cycles leave for the drafter's context, which only a draft needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.cycle import FIELDS

MOST = 32  # the cycles of a row that may wait


class Backlog:
    """The features of the last plain cycles of every slot, which the drafter has yet to read.

    A cycle without a draft only copies its features here. They are read together, before the next draft, or when a row
    has MOST of them. So a row that never drafts hardly pays for its drafter.

    Args:
        slots: the number of slots. width: the size of a token's features.

    Attributes:
        counts: of every slot, the tokens that wait; kept by the host, which knows that a plain cycle commits one.
    """

    def __init__(self, slots: int, width: int, *, dtype: torch.dtype, device: torch.device):
        self.features = torch.zeros(slots * MOST, width, dtype=dtype, device=device)
        self.counts = [0] * slots

    def keep(self, features: Tensor, start: Tensor, slots: Tensor) -> None:
        """Copies the features [B, 1, width] of the anchors, at the positions `start` of rows in `slots` (int64 [B]).

        A token's place depends on its position alone.
        """
        places = self._places(slots, start)
        self.features.index_copy_(0, places, features[:, 0].to(self.features.dtype))

    def take(self, slots: Sequence[int], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What waits in slots: features [B, n, width], positions int64 [B, n] (-1: none), and the slots int32 [B].

        state: the engine's numbers, by which a row's last token stands before its anchor.
        """
        waiting = [self.counts[slot] for slot in slots]
        index, counts = torch.tensor([slots, waiting]).to(state.device, non_blocking=True)
        column = torch.arange(max(waiting), device=state.device)
        positions = state[index, FIELDS.index("start")][:, None] - counts[:, None] + column
        features = self.features[self._places(index[:, None], positions)]
        # A row that has ended, as the host may have yet to read, has fewer. Nothing reads it any more.
        is_there = (column < counts[:, None]) & (positions >= 0)
        return features, torch.where(is_there, positions, -1), index.int()

    def count(self, slots: Sequence[int]) -> None:
        """A plain cycle of these slots has come to its end."""
        for slot in slots:
            self.counts[slot] += 1

    def forget(self, slots: Sequence[int]) -> None:
        """Nothing waits in these slots any more."""
        for slot in slots:
            self.counts[slot] = 0

    def _places(self, slots: Tensor, positions: Tensor) -> Tensor:
        return torch.add(positions % MOST, slots, alpha=MOST)
