"""The forward of our own over a target's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...models import Target
from ...reference.numerics import softcapped
from ..kv_cache import MOST_ROWS, KVCache, capacity_of
from .families import embedding_of, target_stack
from .layers import Rows
from .masks import Masks, causal_masks


class LeanForward:
    """A target of `FAMILIES` over the engine's cache.

    Args:
        slots, tokens: the number of rows, and the largest number of tokens in a row, as in `KVCache`.
        rows: the largest number of a row's tokens in one forward.
        exact: the bits of a row depend on that row alone, whatever is computed beside it.
    """

    def __init__(self, target: Target, *, slots: int, tokens: int, rows: int = MOST_ROWS, exact: bool = False):
        self.target = target
        self.stack = replace(target_stack(target, capacity_of(tokens)), exact=exact)
        self.windows = target.windows
        self.cache = self.make_cache(slots, tokens, rows)
        self.capacity = self.cache.capacity
        self.embed = embedding_of(target)

    def make_cache(self, slots: int, tokens: int, rows: int) -> KVCache:
        """A cache for the target's keys and values; the arguments are those of `KVCache`."""
        target, like = self.target, self.target.head
        return KVCache(
            target.num_layers,
            slots,
            target.config.num_key_value_heads,
            self.stack.head_dim,
            tokens,
            dtype=like.dtype,
            device=like.device,
            windows=[self.windows[layer.kind] for layer in self.stack.layers],
            rows=rows,
        )

    @property
    def positions(self) -> int:
        """The number of positions that rows may have."""
        return min(len(cos) for cos, _ in self.stack.rotary.values())

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
        """Reads tokens [B, R], of which the first `counts` [B] of a row exist, and adds them to the cache.

        Args:
            positions: int64 [B, R], from `start` [B] on; -1 for tokens that do not exist.
            slots: int32 [B].
            taps: the layers whose outputs are the features.
            ends: the row and the column of each token that is to have logits; None is for all tokens. Without any, the
                head does not run and the logits are None.
            masks: `causal_masks`, or `block_masks` for a block that sees all of itself.

        Returns the logits [B, R, V], or [len(ends), V], and the features [B, R, taps * H], None without taps.
        """
        hidden, features = self.hidden(tokens, positions, start, counts, slots, taps, masks)
        if ends is not None and not ends:
            return None, features
        if ends is not None:
            # The host does not wait for this copy.
            wanted = torch.tensor([row * tokens.shape[1] + column for row, column in ends])
            hidden = hidden.flatten(0, 1).index_select(0, wanted.to(hidden.device, non_blocking=True))
        return self.logits(hidden), features

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        start: Tensor,
        counts: Tensor,
        slots: Tensor,
        taps: Sequence[int] = (),
        masks: Masks = causal_masks,
    ) -> tuple[Tensor, Tensor | None]:
        """The output of the last layer [B, R, H] and the features; the arguments are those of `read`."""
        seen = masks(self.windows, start, tokens.shape[1], counts, self.capacity)
        rows = Rows(positions, positions, slots, seen)
        hidden, features = self.stack.forward(self.embed(tokens).flatten(0, 1), rows, self.cache, taps)
        return hidden.view(*tokens.shape, -1), None if features is None else features.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output of the last layer [..., H] to logits [..., V]."""
        return softcapped(self.stack.head(hidden, self.target.head), self.target.softcap)
