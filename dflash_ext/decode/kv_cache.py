"""The cache of the decode engine: fixed buffers, in which every slot is the cache of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCRATCH = 64  # places behind a row's tokens, for a block that is drafted or verified beyond them
ALIGNMENT = 256  # a slot's places are a multiple of this, so that tiles of keys never reach into the next slot
MOST_ROWS = 256  # a row's tokens in one forward, unless a caller says otherwise


@dataclass(frozen=True)
class Pages:
    """The pages of a slot of one layer, which has room for rows of `capacity` tokens.

    Without a window a slot is one page, with a place for each token. In a layer with a window it is as many small pages
    as hold the window and the tokens of a forward. A page that the window has left is the next new one, and the block
    table repeats the pages in turns. So a row's keys are read by their places in the whole row, as in any other layer.
    """

    capacity: int
    count: int
    size: int

    @classmethod
    def of(cls, capacity: int, window: int | None, rows: int) -> Pages:
        count = capacity if window is None else -(-(window + rows) // ALIGNMENT)
        return cls(capacity, count, ALIGNMENT) if count * ALIGNMENT < capacity else cls(capacity, 1, capacity)

    def find(self, slots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The pages (int32 [B, R]) and the places in them of the places of rows (int64 [B, R], -1: nowhere)."""
        if self.count == 1:
            return slots[:, None].expand(places.shape), places
        pages = slots[:, None] * self.count + (places // self.size % self.count).int()
        return pages, torch.where(places < 0, -1, places % self.size)

    def table(self, slots: Tensor) -> Tensor:
        """The block table of rows in these slots (int32 [B]): int32 [B, pages]."""
        if self.count == 1:
            return slots[:, None]
        turns = torch.arange(self.capacity // self.size, dtype=torch.int32, device=slots.device) % self.count
        return slots[:, None] * self.count + turns


class Where(NamedTuple):
    """Where the tokens of a forward lie in a layer's cache, as the operators take it.

    positions, places: int64 [E, n]: by which a token is rotated, and its place in its page; -1 for none.
    pages: int32 [E], where the tokens of an entry go. An entry is a row of the batch or a single token.
    table: int32 [B, pages], the pages that the rows of the batch read (a block table).
    """

    positions: Tensor
    places: Tensor
    pages: Tensor
    table: Tensor


class KVCache:
    """Keys and values of all layers, ``[pages, Hkv, size, D]`` each.

    Nothing here depends on a row's length: lengths live on the device, in the engine's state, and reach the operators
    as positions, places and intervals. Rows find their slots through a table, so that any subset of the slots can be
    decoded without a copy. What lies beyond a row's length is never read, and later tokens overwrite it.

    Args:
        layers, kv_heads, head_dim: those of the model.
        slots: the number of rows that can be kept at a time.
        tokens: the largest number of tokens of a row. `SCRATCH` places are added.
        windows: of each layer, None for one that sees all earlier tokens. By default all do.
        rows: the largest number of a row's tokens in one forward, which layers with a window keep beside it.

    Attributes:
        keys, values: of the layers without a window, ``[layers, slots, Hkv, capacity, D]``.
        layers: the keys and values of each layer.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] | None = None,
        rows: int = MOST_ROWS,
    ):
        self.capacity = capacity_of(tokens)
        self.forms = [Pages.of(self.capacity, window, rows) for window in windows or [None] * layers]
        whole = Pages(self.capacity, 1, self.capacity)
        # Zeros, because a tile of keys is loaded whole, and what is masked must be finite.
        self.buffers = {
            form: torch.zeros(
                *(2, self.forms.count(form), slots * form.count, kv_heads, form.size, head_dim),
                dtype=dtype,
                device=device,
            )
            for form in {whole, *self.forms}
        }
        self.keys, self.values = self.buffers[whole]
        each = {form: iter(buffer.unbind(1)) for form, buffer in self.buffers.items()}
        self.layers = [tuple(next(each[form])) for form in self.forms]

    def where(self, layer: int, positions: Tensor, places: Tensor, slots: Tensor) -> Where:
        """Where the tokens at these places of rows (int64 [B, R], -1: nowhere) in these slots (int32 [B]) lie."""
        form = self.forms[layer]
        if form.count == 1:
            return Where(positions, places, slots, form.table(slots))
        pages, within = form.find(slots, places)
        return Where(positions.reshape(-1, 1), within.view(-1, 1), pages.flatten(), form.table(slots))

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())

    def clear(self, slot: int) -> None:
        for form, buffer in self.buffers.items():
            buffer[:, :, slot * form.count : (slot + 1) * form.count] = 0


def capacity_of(tokens: int) -> int:
    """The places of a slot for rows of at most so many tokens."""
    return -(-(tokens + SCRATCH) // ALIGNMENT) * ALIGNMENT


def block_table(slots: Tensor) -> Tensor:
    """The block table of rows in these slots (int32 [B]): a slot is one page."""
    return slots[:, None]
