"""What cycles leave for a drafter to read: the features of tokens, or the tokens themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.cycle import CycleRows, read_ring, write_ring
from ..kv_cache import MOST_ROWS

MOST = 128  # the tokens of a row whose features may wait
CHUNK = MOST_ROWS  # the tokens of a row that are read at a time
AT_ONCE = 2048  # the tokens of all rows that are read at a time, with those that fill up shorter rows


class Backlog:
    """The features of the last plain cycles of every slot, which the drafter has yet to read.

    A cycle without a draft only copies its features here. They are read together, before the next draft, or when there
    is no room for more. So a row that never drafts hardly pays for its drafter.

    Args:
        slots: the number of slots. most: the tokens of each that may wait. width: the size of a token's features.

    Attributes:
        ring: [slots, most, width], as `write_ring` keeps it.
        counts: of every slot, the most tokens that wait; kept by the host, which reads a cycle's records later.
        room: the tokens of a row that a draft reads by itself.
        spare: the last slot, which belongs to no row.
    """

    room = 0

    def __init__(self, slots: int, most: int, width: int, *, dtype: torch.dtype, device: torch.device):
        self.ring = torch.zeros(slots, most, width, dtype=dtype, device=device)
        self.most, self.counts, self.spare = most, [0] * slots, slots - 1
        self.has_few_shapes = device.type == "cuda"

    def keep(self, values: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Keeps what belongs to tokens, [B, R, width], at `positions` (int64 [B, R], -1: none) of the rows in `slots`
        (int32 [B])."""
        write_ring(self.ring, values.to(self.ring.dtype).contiguous(), positions, slots)

    def late(self, slots: Sequence[int], width: int) -> list[list[int]]:
        """Those of these slots whose tokens must be read before a cycle that drafts `width` tokens, in parts that are
        read at a time."""
        most = max(map(self.counts.__getitem__, slots))
        if most <= self.room or not (width or most >= self.most):
            return []
        late = [slot for slot in slots if self.counts[slot] > self.room]
        count = max(1, AT_ONCE // self.filled(min(most, CHUNK)))
        return [late[first : first + count] for first in range(0, len(late), count)]

    def filled(self, count: int) -> int:
        """The number of rows, or of tokens of a row, up to which so many are filled up when they are read.

        On a GPU it is a power of two: a product of features takes little time, but the first one of a shape loads a
        kernel, which takes the host 8 ms on an H200.
        """
        return 1 << (count - 1).bit_length() if self.has_few_shapes else count

    def waiting(self, rows: CycleRows, counts: Tensor) -> Tensor:
        """How many tokens wait in the slots of rows, int64 [B]. counts: what the host knows of it.

        A row that has ended, as the host may have yet to read, has fewer. Nothing reads what becomes of it.
        """
        return counts

    def take(self, start: Tensor, counts: Tensor, slots: Tensor, most: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The first arguments of `Draft.inject` for the last `counts` tokens before `start` (int64 [B]), or the first
        `most` of these."""
        features, positions = read_ring(self.ring, start, counts, slots, most)
        return positions, features, positions

    def count(self, slots: Sequence[int], width: int) -> None:
        """A cycle of these slots that drafted `width` tokens has come to its end."""
        counts = self.counts
        if width:  # it has read what waited before
            for slot in slots:
                counts[slot] = min(width + 1, self.room)
        else:
            for slot in slots:
                counts[slot] += 1

    def mark(self, rows: CycleRows, count: int | None = None) -> None:
        """The drafter has read `count` more tokens of rows, or all that are left before their anchors."""

    def forget(self, slots: Sequence[int]) -> None:
        """Nothing waits in these slots any more."""
        for slot in slots:
            self.counts[slot] = 0

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self.ring[slot] = 0


class UnreadTokens(Backlog):
    """The committed tokens of every slot that a drafter with a forward of its own has yet to read.

    A draft reads the tokens that the cycle before it committed in its own forward, which has `room` for them. If plain
    cycles have left more, they are read before it. All tokens of a row may wait.

    Args:
        tokens: the largest number of tokens in a row.

    Attributes:
        read: int64 [slots], the number of tokens that the drafter has read.
    """

    def __init__(self, slots: int, tokens: int, room: int, device: torch.device):
        super().__init__(slots, tokens, 1, dtype=torch.int64, device=device)
        self.has_few_shapes = False  # a forward takes time for every token
        self.room = room
        self.read = torch.zeros(slots, dtype=torch.int64, device=device)

    def waiting(self, rows: CycleRows, counts: Tensor | None = None) -> Tensor:
        """As that of `Backlog`. The host knows a bound alone."""
        return rows.start - self.read.index_select(0, rows.slots)

    def take(self, start: Tensor, counts: Tensor, slots: Tensor, most: int) -> tuple[Tensor, None, Tensor]:
        tokens, positions = read_ring(self.ring, start, counts, slots, most)
        return tokens[..., 0], None, positions

    def mark(self, rows: CycleRows, count: int | None = None) -> None:
        read = rows.start
        if count is not None:
            read = torch.minimum(self.read.index_select(0, rows.slots) + count, read)
        self.read.index_copy_(0, rows.slots.long(), read)
