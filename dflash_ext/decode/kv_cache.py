"""The cache of the decode engine: fixed buffers, in which every slot is the cache of one row."""

from __future__ import annotations

import torch
from torch import Tensor

SCRATCH = 64  # places behind a row's tokens, for a block that is drafted or verified beyond them
ALIGNMENT = 256  # a slot's places are a multiple of this, so that tiles of keys never reach into the next slot


class KVCache:
    """Keys and values of all layers, ``[layers, slots, Hkv, capacity, D]`` each.

    Nothing here depends on a row's length: lengths live on the device, in the engine's state, and reach the operators
    as positions, places and intervals. Rows find their slots through a table, so that any subset of the slots can be
    decoded without a copy. What lies beyond a row's length is never read, and later tokens overwrite it.

    Args:
        layers, kv_heads, head_dim: those of the model.
        slots: the number of rows that can be kept at a time.
        tokens: the largest number of tokens of a row. `SCRATCH` places are added.
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
    ):
        self.capacity = capacity_of(tokens)
        shape = layers, slots, kv_heads, self.capacity, head_dim
        # Zeros, because a tile of keys is loaded whole, and what is masked must be finite.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        # The layers one by one: as [slots, Hkv, capacity, D], and as pages [slots, capacity, Hkv, D].
        self.layers = list(zip(self.keys, self.values, strict=True))
        self.pages = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in self.layers]

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def clear(self, slot: int) -> None:
        self.keys[:, slot] = 0
        self.values[:, slot] = 0


def capacity_of(tokens: int) -> int:
    """The places of a slot for rows of at most so many tokens."""
    return -(-(tokens + SCRATCH) // ALIGNMENT) * ALIGNMENT


def block_table(slots: Tensor) -> Tensor:
    """The block table of rows in these slots (int32 [B]): a slot is one page."""
    return slots[:, None]
