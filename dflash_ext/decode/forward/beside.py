"""A stack in which some rows of each entry have a LoRA adapter, in products beside those of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear as product_of

from ...ops import linear
from ...ops.layer import add_rms_norm, gated
from ..kv_cache import KVCache
from .layers import LayerWeights, Rows, Stack
from .lora import Halves, LayerHalves


@dataclass(frozen=True)
class BesideStack(Stack):
    """The base's weights are read once for all rows. The rows before `first` of each entry keep the base's bits.

    halves: of each layer. entries: the number of entries of a batch, each with as many rows.
    """

    # A group of mask rows sees rows of its own forward as its context.
    context_is_older: ClassVar[bool] = False

    halves: Sequence[LayerHalves] = ()
    first: int = 0
    entries: int = 1

    @classmethod
    def of(cls, stack: Stack, halves: Sequence[LayerHalves]) -> BesideStack:
        return cls(**{each.name: getattr(stack, each.name) for each in fields(Stack)}, halves=halves)

    def on(self, first: int, entries: int) -> BesideStack:
        """The same stack for entries whose rows from `first` on have the adapter."""
        return replace(self, first=first, entries=entries)

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """As that of `Stack`; there are no taps."""
        *_, output = self.layer_by_layer(hidden, rows, cache)
        return output, None

    def layer_by_layer(self, hidden: Tensor, rows: Rows, cache: KVCache, taps: Sequence[int] = ()) -> Iterator[Tensor]:
        """As that of `Stack`; there are no taps."""
        placed = self._placed(rows, cache)
        for index, (layer, halves) in enumerate(zip(self.layers, self.halves, strict=True)):
            given = layer.attention_norm, layer.qkv, layer.qkv_bias, halves.qkv
            attended = self._attended(index, self._product(hidden, *given), placed)
            given = layer.out, layer.out_bias, layer.after_attention, halves.out
            hidden = self._sum(hidden, attended, *given)
            inner = self._middle(hidden, layer, halves.gate_up)
            hidden = self._sum(hidden, inner, layer.down, layer.down_bias, layer.after_mlp, halves.down)
            yield hidden

    def _product(
        self, hidden: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, halves: Halves | None
    ) -> Tensor:
        """The product of the normalised rows."""
        if halves is None:
            return self._linear(hidden, weight, bias, norm=norm)
        normed = add_rms_norm(hidden, norm, eps=self.eps, plus_one=self.plus_one)
        # The base's rows keep their bits by the same call as without an adapter.
        rows, around = (hidden, {"norm": norm}) if self._keeps_bits(hidden) else (normed, {})
        product = self._linear(rows, weight, bias, **around)
        self._add_rows(product, normed, halves)
        return product

    def _middle(self, hidden: Tensor, layer: LayerWeights, halves: Halves | None) -> Tensor:
        """The middle of the gated MLP."""
        given = layer.mlp_norm, layer.gate_up, layer.gate_up_bias
        if halves is None:
            return self._linear(hidden, *given[1:], norm=layer.mlp_norm, gate=self.activation)
        if not (self.first and self._keeps_bits(hidden)):
            return gated(self._product(hidden, *given, halves), self.activation)
        # The base's rows take the product with the gate in it, which rounds once.
        parts = self._by_entry(hidden).split([self.first, len(hidden) // self.entries - self.first], dim=1)
        base, others = (part.flatten(0, 1) for part in parts)
        base = self._linear(base, *given[1:], norm=layer.mlp_norm, gate=self.activation)
        others = gated(self.on(0, 1)._product(others, *given, halves), self.activation)
        joined = [part.view(self.entries, -1, part.shape[-1]) for part in (base, others)]
        return torch.cat(joined, dim=1).flatten(0, 1)

    def _sum(
        self,
        hidden: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
        halves: Halves | None,
    ) -> Tensor:
        """The residual stream after a sublayer, as `_add` gives it."""
        if halves is None or norm is None:
            if halves is not None:
                self._add_rows(hidden, rows, halves)
            return self._add(hidden, rows, weight, bias, norm)
        update = self._linear(rows, weight, bias)
        self._add_rows(update, rows, halves)
        add_rms_norm(hidden, norm, update=update, update_norm=norm, eps=self.eps, plus_one=self.plus_one)
        return hidden

    def _keeps_bits(self, rows: Tensor) -> bool:
        """Whether the bits of a row are to depend on that row alone."""
        return self.exact or not rows.is_cuda

    def _add_rows(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """Adds the adapter's product of rows x [T, K] to that of the base [T, N], in place."""
        (self._add_in_place if product.is_cuda else self._add_row_by_row)(product, x, halves)

    def _add_in_place(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """By two products of torch. In a batch of several entries the base's rows add zeros."""
        rows = slice(self.first if self.entries == 1 else 0, None)
        inner = product_of(x[rows], halves.down)
        if self.first and self.entries > 1:
            self._by_entry(inner)[:, : self.first] = 0
        product[rows].addmm_(inner, halves.up.t())

    def _add_row_by_row(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """By products in which a row's bits depend on that row alone."""
        inner = linear(self._by_entry(x)[:, self.first :], halves.down)
        self._by_entry(product)[:, self.first :] += linear(inner, halves.up)

    def _by_entry(self, x: Tensor) -> Tensor:
        return x.view(self.entries, -1, x.shape[-1])
