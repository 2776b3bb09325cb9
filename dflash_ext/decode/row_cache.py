"""A key/value cache in which every row has its own length."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Placement:
    """Where the next tokens go. The layers of one cache share it."""

    rows: Tensor
    slots: Tensor
    visible: int = 0


class _RowLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, placement: _Placement, capacity: int):
        super().__init__()
        self.placement = placement
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # One extra slot receives what padding writes. All slots start at zero, because masked ones are multiplied, too.
        def room(states: Tensor) -> Tensor:
            batch, heads, _, width = states.shape
            return states.new_zeros(batch, heads, self.capacity + 1, width)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, slots, visible = self.placement.rows, self.placement.slots, self.placement.visible
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.placement.visible, 0

    def get_seq_length(self) -> int:
        return self.placement.visible

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length


class RowCache(Cache):
    """Keeps each token at the slot of its position, so that rows may grow and shrink by different lengths.

    Dropping rejected tokens costs nothing: slots beyond a row's length are masked, and later tokens overwrite them.

    Args:
        capacity: the number of positions per row.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.placement = _Placement()
        super().__init__(layer_class_to_replicate=partial(_RowLayer, self.placement, capacity))

    @property
    def visible(self) -> int:
        """How many slots of every row the next forward reads."""
        return self.placement.visible

    def place(self, positions: Tensor, end: int) -> None:
        """Says where the next forward's tokens go.

        Args:
            positions: int64 [B, Q], -1 for padding, which is not kept.
            end: one more than the highest position that the forward reads or writes in any row. The caller passes it,
                because computing it here would wait for the device.

        Raises:
            ValueError: the cache has no room for the highest position.
        """
        if end > self.capacity:
            raise ValueError(f"position {end - 1} is beyond the cache's capacity of {self.capacity} tokens")
        placement = self.placement
        placement.visible = end
        placement.slots = torch.where(positions < 0, self.capacity, positions)
        placement.rows = torch.arange(positions.shape[0], device=positions.device)[:, None]

    def select(self, rows: Tensor) -> None:
        """Keeps only `rows` (int64 indices) of the batch."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
