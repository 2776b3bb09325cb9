"""Runs rows of which some have a LoRA adapter: beside the base's products, or over weights with the adapter in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...models import Target
from ...models.lora import LoraAdapter
from ..kv_cache import KVCache
from .beside import BesideStack
from .layers import LayerWeights, Rows
from .lean import LeanForward
from .lora import LayerHalves, halves_of, join

# Elements of a layer's largest weight. Up to here a layer's time on a GPU is the latency of its kernels, so that a copy
# of the weights with the adapter added is faster than kernels for the adapter. Larger weights are read once for all.
MOST_MERGED = 1 << 22


def has_large_weights(target: Target) -> bool:
    """Whether a layer has a weight of more than MOST_MERGED elements."""
    return max(weight.numel() for layer in target.layers for weight in layer.parameters()) > MOST_MERGED


class AdaptedForward:
    """A target's forward for entries whose first rows are the base's, and whose others have an adapter.

    The base's rows keep the bits that they have without the others. Both write their keys and values to one cache.
    """

    def __init__(self, forward: LeanForward, adapter: LoraAdapter):
        self.forward = forward
        stack, halves = forward.stack, halves_of(adapter, forward.target)
        self.beside, self.merged, self.side = None, None, None
        if has_large_weights(forward.target):
            if forward.target.head.is_cuda and not stack.exact:
                halves = join(stack.layers, halves, adapter.rank, forward.target)
            self.beside = BesideStack.of(stack, halves)
        else:
            self.merged = replace(stack, layers=_merged(stack.layers, halves), exact=False)
            if forward.target.device.type == "cuda":
                self.side = torch.cuda.Stream(forward.target.device)

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
        own, behind = where.part(0, first), where.part(first, None)
        given = base.flatten(0, 1), others.flatten(0, 1)
        if first and self.side is not None:
            outputs = self._together(*given, own, behind, cache)
        else:
            outputs = (
                self.forward.stack.forward(given[0], own, cache)[0] if first else given[0],
                self.merged.forward(given[1], behind, cache)[0],
            )
        return outputs[0].view_as(base), outputs[1].view_as(others)

    def _together(self, base: Tensor, others: Tensor, own: Rows, behind: Rows, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Runs both in two streams of a GPU. The others are a layer behind, so that the base's keys are there."""
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        base_layers = self.forward.stack.layer_by_layer(base, own, cache)
        other_layers = self.merged.layer_by_layer(others, behind, cache)
        for _ in self.merged.layers:
            base = next(base_layers)
            written = main.record_event()
            with torch.cuda.stream(self.side):
                self.side.wait_event(written)
                others = next(other_layers)
        main.wait_stream(self.side)
        return base, others


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
