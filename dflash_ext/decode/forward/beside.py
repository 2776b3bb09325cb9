"""A stack in which some rows of each entry have a LoRA adapter, in products beside those of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import linear as product_of

from ...ops import linear
from ...ops.layer import add_halves, add_rms_norm, gated
from ..kv_cache import KVCache
from .layers import LayerWeights, Rows, Stack
from .lora import Halves, JointHalves, LayerHalves


@dataclass
class Stream:
    """The residual stream [T, H], and what is yet to be added to it: the next norm does that in the same pass."""

    hidden: Tensor
    update: Tensor | None = None

    def summed(self) -> Tensor:
        """The stream with the update, which is added in place."""
        if self.update is not None:
            self.hidden, self.update = self.hidden.add_(self.update), None
        return self.hidden


@dataclass(frozen=True)
class BesideStack(Stack):
    """The base's weights are read once for all rows. The rows before `first` of each entry keep the base's bits.

    halves: of each layer. entries: the number of entries of a batch, each with as many rows.
    """

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
        placed, stream = self._placed(rows, cache), Stream(hidden)
        for index, (layer, halves) in enumerate(zip(self.layers, self.halves, strict=True)):
            projected = self._product(stream, layer.attention_norm, layer.qkv, layer.qkv_bias, halves.qkv)
            attended = self._attended(index, projected, placed)
            stream = self._sum(stream, attended, layer.out, layer.out_bias, layer.after_attention, halves.out)
            inner = self._middle(stream, layer, halves.gate_up)
            stream = self._sum(stream, inner, layer.down, layer.down_bias, layer.after_mlp, halves.down)
        return stream.summed(), None

    def _product(
        self, stream: Stream, norm: Tensor, weight: Tensor, bias: Tensor | None, halves: Halves | JointHalves | None
    ) -> Tensor:
        """The product of the normalised rows."""
        if halves is None:
            return self._linear(stream.summed(), weight, bias, norm=norm)
        normed = self._normed(stream, norm)
        if isinstance(halves, JointHalves):
            return self._joint(normed, bias, halves)
        # The base's rows keep their bits by the same call as without an adapter.
        rows, around = (stream.hidden, {"norm": norm}) if self._keeps_bits(normed) else (normed, {})
        product = self._linear(rows, weight, bias, **around)
        self._add_rows(product, normed, halves)
        return product

    def _normed(self, stream: Stream, norm: Tensor) -> Tensor:
        """The norm of the stream with the update, which is added in place."""
        update, stream.update = stream.update, None
        return add_rms_norm(stream.hidden, norm, update=update, eps=self.eps, plus_one=self.plus_one)

    def _middle(self, stream: Stream, layer: LayerWeights, halves: Halves | JointHalves | None) -> Tensor:
        """The middle of the gated MLP."""
        given = layer.mlp_norm, layer.gate_up, layer.gate_up_bias
        if halves is None:
            return self._linear(stream.summed(), *given[1:], norm=layer.mlp_norm, gate=self.activation)
        if isinstance(halves, JointHalves):
            normed = self._normed(stream, layer.mlp_norm)
            return self._joint(normed, layer.gate_up_bias, halves, activation=self.activation)
        if not (self.first and self._keeps_bits(stream.hidden)):
            return gated(self._product(stream, *given, halves), self.activation)
        # The base's rows take the product with the gate in it, which rounds once.
        rows = self._by_entry(stream.summed())
        base, others = (part.flatten(0, 1) for part in (rows[:, : self.first], rows[:, self.first :]))
        base = self._linear(base, *given[1:], norm=layer.mlp_norm, gate=self.activation)
        others = gated(self.on(0, 1)._product(Stream(others), *given, halves), self.activation)
        joined = [part.view(self.entries, -1, part.shape[-1]) for part in (base, others)]
        return torch.cat(joined, dim=1).flatten(0, 1)

    def _sum(
        self,
        stream: Stream,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
        halves: Halves | JointHalves | None,
    ) -> Stream:
        """The residual stream after a sublayer, as `_add` gives it."""
        if isinstance(halves, JointHalves):
            update = self._joint(rows, bias, halves)
            if norm is None:
                return Stream(stream.summed(), update)
        elif halves is None or norm is None:
            hidden = stream.summed()
            if halves is not None:
                self._add_rows(hidden, rows, halves)
            return Stream(self._add(hidden, rows, weight, bias, norm))
        else:
            update = self._linear(rows, weight, bias)
            self._add_rows(update, rows, halves)
        hidden = stream.summed()
        add_rms_norm(hidden, norm, update=update, update_norm=norm, eps=self.eps, plus_one=self.plus_one)
        return Stream(hidden)

    def _keeps_bits(self, rows: Tensor) -> bool:
        """Whether the bits of a row are to depend on that row alone."""
        return self.exact or not rows.is_cuda

    def _joint(self, x: Tensor, bias: Tensor | None, halves: JointHalves, activation: str | None = None) -> Tensor:
        """The product of rows x with the adapter, whose rows may lie apart: one product reads both weights. With an
        activation, the middle of a gated MLP."""
        product, inner = self._linear(x, halves.weight).tensor_split([len(halves.own)], dim=1)
        if bias is not None:
            product.add_(bias)
        where = {"entries": self.entries, "first": self.first, "activation": activation}
        return add_halves(product, inner, halves.own, halves.ends, halves.places, **where)

    def _add_rows(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """Adds the adapter's product of rows x [T, K] to that of the base [T, N], in place."""
        (self._add_in_place if product.is_cuda else self._add_row_by_row)(product, x, halves)

    def _add_in_place(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """By two products of torch. In a batch of several entries the base's rows add zeros."""
        rows, inner = slice(self.first if self.entries == 1 else 0, None), product_of(x, halves.down)
        if self.first and self.entries > 1:
            inner.unflatten(0, (self.entries, -1))[:, : self.first] = 0
        product[rows].addmm_(inner[rows], halves.up.t())

    def _add_row_by_row(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """By products in which a row's bits depend on that row alone."""
        inner = linear(self._by_entry(x)[:, self.first :], halves.down)
        self._by_entry(product)[:, self.first :] += linear(inner, halves.up)

    def _by_entry(self, x: Tensor) -> Tensor:
        return x.view(self.entries, -1, x.shape[-1])
