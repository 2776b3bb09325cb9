"""Committed tokens that a drafter has yet to read. Its next draft reads them in its own forward."""

from __future__ import annotations

import torch
from torch import Tensor


class WaitingTokens:
    """The tokens that the last cycle of each slot committed.

    Args:
        slots: the number of slots.
        most: the largest number of tokens that a cycle commits.
    """

    def __init__(self, slots: int, most: int, device: torch.device):
        self.tokens = torch.zeros(slots, most, dtype=torch.int64, device=device)
        self.counts = torch.zeros(slots, dtype=torch.int64, device=device)

    def keep(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Replaces the tokens of these slots by int64 [B, n] others. Those at negative positions are padding."""
        index = slots.long()
        padded = torch.nn.functional.pad(tokens, (0, self.tokens.shape[1] - tokens.shape[1]))
        self.tokens.index_copy_(0, index, padded)
        self.counts.index_copy_(0, index, (positions >= 0).sum(dim=1))

    def drop(self, slots: Tensor) -> None:
        """Forgets the tokens of these slots."""
        self.counts.index_fill_(0, slots.long(), 0)

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of slots, int64 [B, most], and how many they are, int64 [B]."""
        index = slots.long()
        return self.tokens.index_select(0, index), self.counts.index_select(0, index)


def places_from(first: Tensor, counts: Tensor, width: int) -> Tensor:
    """The positions from `first` (int64 [B]) on of `counts` tokens in rows of `width`, and -1 behind them."""
    column = torch.arange(width, device=first.device)
    return torch.where(column < counts[:, None], first[:, None] + column, -1)
