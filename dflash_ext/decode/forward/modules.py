"""The forward of any other target: its own modules, over a cache of slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ...integrations import as_attention_mask
from ...integrations.attention import gathered, runs_block_attn
from ...models import Target
from ...models.isolated import Outputs, all_near, layer_outputs, random_states
from ..kv_cache import MOST_ROWS, Pages, capacity_of
from .masks import Masks, causal_masks


class _Placement:
    """Where the next tokens go, and what a forward reads. The layers of one cache share it.

    at: by the form of a layer's pages, the page and the place in it of each token, and the block table.
    """

    at: dict[Pages, tuple[Tensor, Tensor, Tensor]]
    gathers: bool

    def on(self, device: torch.device, pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
        """The entry of `at`, on the device of a layer."""
        return tuple(numbers.to(device) for numbers in self.at[pages])


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [pages, Hkv, size, D] each. The last slot also receives what padding writes."""

    is_sliding = False

    def __init__(self, placement: _Placement, slots: int, pages: Pages):
        super().__init__()
        self.placement, self.slots, self.pages = placement, slots, pages

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because masked keys and values are multiplied, too.
        self.keys, self.values = (
            states.new_zeros(self.slots * self.pages.count, states.shape[1], self.pages.size, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pages, places, table = self.placement.on(key_states.device, self.pages)
        self.keys[pages, :, places] = key_states.transpose(1, 2)
        self.values[pages, :, places] = value_states.transpose(1, 2)
        if not self.placement.gathers:
            return self.keys, self.values
        return gathered(self.keys, table), gathered(self.values, table)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.pages.capacity, 0

    def get_seq_length(self) -> int:
        return self.pages.capacity

    def get_max_length(self) -> int:
        return self.pages.capacity

    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """Keeps each token of a row at the place of its position in the row's slot, as `KVCache` does.

    Layers may differ in their heads and widths, as the first forward finds them.

    Args:
        slots, tokens: the number of rows, and the largest number of tokens in a row.
        windows, rows: as in `KVCache`.
    """

    def __init__(self, slots: int, tokens: int, windows: Sequence[int | None], rows: int = MOST_ROWS):
        self.placement, self.slots, self.capacity = _Placement(), slots, capacity_of(tokens)
        self.forms = [Pages.of(self.capacity, window, rows) for window in windows]
        super().__init__(layers=[_SlotLayer(self.placement, slots, pages) for pages in self.forms])

    def place(self, slots: Tensor, places: Tensor, *, gathers: bool) -> dict[int, Tensor]:
        """Says where the next tokens go: to `places` (int64 [B, R], -1: nowhere) of these `slots` (int32 [B]).

        gathers: layers get copies of the rows' slots, and else all pages, which they read by a block table.

        Returns the block tables, by the size of their pages.
        """
        self.placement.at, self.placement.gathers = {}, gathers
        for form in set(self.forms):
            pages, within = form.find(slots, places)
            pages = pages.long().where(within >= 0, (self.slots - 1) * form.count)
            self.placement.at[form] = pages, within.clamp(min=0), form.table(slots)
        return {form.size: table for form, (_, _, table) in self.placement.at.items()}

    def _used(self) -> Iterator[_SlotLayer]:
        """The layers that have keys of their own."""
        return (layer for layer in self.layers if layer.is_initialized)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self._used() for x in (layer.keys, layer.values))

    def clear(self, slot: int) -> None:
        for layer in self._used():
            pages = slice(slot * layer.pages.count, (slot + 1) * layer.pages.count)
            layer.keys[pages] = 0
            layer.values[pages] = 0


class ModuleForward:
    """A target's own modules over a cache of slots.

    Models whose attention goes through transformers' AttentionInterface run with `block_attn`, which reads the slots in
    their places. Others, and models that it does not serve (with latent attention, or with masks of their own making),
    run with their own attention under dense masks, for which the slots of the rows are copied in each layer. Which of
    the two it is, a first forward of a few tokens finds out.

    Args: as those of `LeanForward`.
    """

    def __init__(self, target: Target, *, slots: int, tokens: int, rows: int = MOST_ROWS, exact: bool = False):
        if exact:
            name = type(target.model).__name__
            raise ValueError(f"exact=True is not supported: the engine has no forward of its own for this {name}")
        self.target, self.windows, self.rows = target, target.windows, rows
        kinds = getattr(target.config, "layer_types", None) or [*self.windows] * target.num_layers
        self.cache = SlotCache(slots, tokens, [self.windows[kind] for kind in kinds], rows)
        self.capacity = self.cache.capacity
        # The first forward makes the layers of the cache, and says what block_attn must give.
        self.reads_slots = False
        expected = self._first_outputs(slots - 1)
        self.reads_slots = type(target.model).is_backend_compatible()
        self.reads_slots = self.reads_slots and self._gives(expected, slots - 1)

    def _first_outputs(self, slot: int) -> Outputs:
        """What each layer puts out for a few random states in this slot."""
        count = min(8, self.rows)
        positions = torch.arange(count, device=self.target.device)[None]
        start = torch.zeros_like(positions[0, :1])
        tokens, slots = positions % self.target.vocab_size, torch.full_like(start, slot, dtype=torch.int32)
        states = random_states(1, count, self.target.hidden_size)
        return layer_outputs(
            self.target.layers, states, lambda: self.read(tokens, positions, start, start + count, slots, ends=())
        )

    def _gives(self, expected: Outputs, slot: int) -> bool:
        """Whether `_first_outputs` are these, but for rounding."""
        try:
            return all_near(self._first_outputs(slot), expected)
        except (ValueError, RuntimeError):  # shapes that block_attn does not take, or masks that the model writes to
            return False

    def lengthen_tables(self) -> None:
        """Reads as many tokens as a forward may have, none of which exists.

        Some models (XGLM) replace their table of positions by a longer one when a forward has more tokens than any
        before it. A CUDA graph, which keeps addresses, must find the longest one.
        """
        none = torch.full((1, self.rows), -1, device=self.target.device)
        zero = torch.zeros_like(none[0, :1])
        spare = torch.full_like(zero, self.cache.slots - 1, dtype=torch.int32)
        self.read(none.clamp(min=0), none, zero, zero, spare, ends=())

    def read(
        self,
        tokens: Tensor,
        positions: Tensor,
        start: Tensor,
        counts: Tensor,
        slots: Tensor,
        taps: Sequence[int] = (),
        ends: Sequence[tuple[int, int]] | None = None,
        masks: Masks = causal_masks,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As that of `LeanForward`."""
        seen = masks(self.windows, start, tokens.shape[1], counts, self.capacity)
        given = {}
        tables = self.cache.place(slots, positions, gathers=not self.reads_slots)
        if self.reads_slots:
            seen = {kind: as_attention_mask(mask) for kind, mask in seen.items()}
            given["block_table"] = tables
        else:
            seen = {kind: mask.to_dense(self.target.dtype) for kind, mask in seen.items()}
        columns = None if ends is None else sorted({column for _, column in ends})
        with runs_block_attn([self.target]) if self.reads_slots else nullcontext():
            logits, features = self.target.step(
                tokens, positions, self.cache, seen, columns=columns, tapped=bool(taps), **given
            )
        if ends:
            rows = [row for row, _ in ends]
            logits = logits[rows, [columns.index(column) for _, column in ends]]
        return logits, features
