"""Runs rows of which some have a LoRA adapter: beside the base's products, or over weights with the adapter in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...models.lora import LoraAdapter
from ..kv_cache import KVCache
from .beside import BesideStack
from .layers import LayerWeights, Rows
from .lean import LeanForward
from .lora import LayerHalves, halves_of, join

# Elements of a layer's largest weight. Up to here a layer's time on a GPU is the latency of its kernels, so that a copy
# of the weights with the adapter added is faster than kernels for the adapter. Larger weights are read once for all.
MOST_MERGED = 1 << 23


class AdaptedForward:
    """A target's forward for entries whose first rows are the base's, and whose others have an adapter.

    The base's rows keep the bits that they have without the others. Both write their keys and values to one cache.
    """

    def __init__(self, forward: LeanForward, adapter: LoraAdapter):
        self.forward = forward
        stack, halves = forward.stack, halves_of(adapter, forward.target)
        self.beside, self.merged = None, None
        if max(layer.gate_up.numel() for layer in stack.layers) > MOST_MERGED:
            if forward.target.head.is_cuda and not stack.exact:
                halves = join(stack.layers, halves, forward.target)
            self.beside = BesideStack.of(stack, halves)
        else:
            self.merged = replace(stack, layers=_merged(stack.layers, halves), exact=False)

    def run(self, base: Tensor, others: Tensor, where: Rows, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """The outputs of the last layer [B, n, H] of the base's rows and [B, m, H] of the others.

        Args:
            base, others: [B, n, H] and [B, m, H], n may be 0. They are overwritten.
            where: of all rows, the base's first.
            cache: another one than the target's own, for entries without rows of the base.
        """
        entries, first, width = base.shape
        cache = cache or self.forward.cache
        if self.beside is not None:
            rows = torch.cat([base, others], dim=1).flatten(0, 1)
            hidden = self.beside.on(first, entries).forward(rows, where, cache)[0].view(entries, -1, width)
            return hidden[:, :first], hidden[:, first:]
        if first:
            own = where.part(0, first)
            base = self.forward.stack.forward(base.flatten(0, 1), own, cache)[0].view_as(base)
        where = where.part(first, None)
        return base, self.merged.forward(others.flatten(0, 1), where, cache)[0].view_as(others)


def _merged(layers: Sequence[LayerWeights], halves: Sequence[LayerHalves]) -> list[LayerWeights]:
    """Copies of the weights that have an adapter, with the adapter added to them."""

    def merged(layer: LayerWeights, of_layer: LayerHalves) -> LayerWeights:
        changes = {}
        for field in fields(of_layer):
            if (pair := getattr(of_layer, field.name)) is not None:
                weight = getattr(layer, field.name)
                changes[field.name] = torch.addmm(weight.float(), pair.up.float(), pair.down.float()).to(weight.dtype)
        return replace(layer, **changes)

    return [merged(*pair) for pair in zip(layers, halves, strict=True)]
