"""A stack in which some rows of each entry have a LoRA adapter, in products beside those of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
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

    On a GPU the adapter's products run in a second stream while the large ones of the base read their weights.

    halves: of each layer. entries: the number of entries of a batch, each with as many rows.
    """

    # A group of mask rows sees rows of its own forward as its context.
    context_is_older: ClassVar[bool] = False

    halves: Sequence[LayerHalves] = ()
    first: int = 0
    entries: int = 1
    side: torch.cuda.Stream | None = field(default=None, compare=False)

    @classmethod
    def of(cls, stack: Stack, halves: Sequence[LayerHalves]) -> BesideStack:
        device = stack.final_norm.device
        own = {each.name: getattr(stack, each.name) for each in fields(Stack)}
        return cls(**own, halves=halves, side=torch.cuda.Stream(device) if device.type == "cuda" else None)

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
        placed, update = self._placed(rows, cache), None
        for index, (layer, halves) in enumerate(zip(self.layers, self.halves, strict=True)):
            given = layer.attention_norm, layer.qkv, layer.qkv_bias, halves.qkv
            attended = self._attended(index, self._product(hidden, update, *given), placed)
            given = layer.out, layer.out_bias, layer.after_attention, halves.out
            hidden, update = self._sum(hidden, attended, *given)
            inner = self._middle(hidden, update, layer, halves.gate_up)
            hidden, update = self._sum(hidden, inner, layer.down, layer.down_bias, layer.after_mlp, halves.down)
            if update is not None and index == len(self.layers) - 1:
                hidden += update
            yield hidden

    def _product(
        self,
        hidden: Tensor,
        update: Tensor | None,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        halves: Halves | None,
    ) -> Tensor:
        """The product of the normalised rows. `update` is first added to the residual stream, in place."""
        if halves is None and update is None:
            return self._linear(hidden, weight, bias, norm=norm)
        normed = add_rms_norm(hidden, norm, update=update, eps=self.eps, plus_one=self.plus_one)
        if halves is None:
            return self._linear(normed, weight, bias)
        if self._keeps_bits(hidden):  # by the same call as without an adapter
            product = self._linear(hidden, weight, bias, norm=norm)
            self._add_rows(product, normed, halves)
            return product
        finish = self._begin(normed, halves)
        product = self._linear(normed, weight, bias)
        finish(product)
        return product

    def _middle(self, hidden: Tensor, update: Tensor | None, layer: LayerWeights, halves: Halves | None) -> Tensor:
        """The middle of the gated MLP."""
        given = layer.mlp_norm, layer.gate_up, layer.gate_up_bias
        if halves is None and update is None:
            return self._linear(hidden, *given[1:], norm=layer.mlp_norm, gate=self.activation)
        if not (halves and self.first and self._keeps_bits(hidden)):
            return gated(self._product(hidden, update, *given, halves), self.activation)
        # The base's rows take the product with the gate in it, which rounds once.
        parts = self._by_entry(hidden).split([self.first, len(hidden) // self.entries - self.first], dim=1)
        base, others = (part.flatten(0, 1) for part in parts)
        base = self._linear(base, *given[1:], norm=layer.mlp_norm, gate=self.activation)
        others = gated(self.on(0, 1)._product(others, None, *given, halves), self.activation)
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
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after a sublayer, as `_add` gives it, and what is yet to be added (None: nothing)."""
        if halves is None:
            return self._add(hidden, rows, weight, bias, norm), None
        if norm is None and self._keeps_bits(rows):
            self._add_rows(hidden, rows, halves)
            return self._add(hidden, rows, weight, bias, None), None
        if norm is None:  # the next norm's kernel adds the product
            finish = self._begin(rows, halves, into=hidden)
            update = self._linear(rows, weight, bias)
            finish()
            return hidden, update
        update = self._linear(rows, weight, bias)
        self._add_rows(update, rows, halves)
        add_rms_norm(hidden, norm, update=update, update_norm=norm, eps=self.eps, plus_one=self.plus_one)
        return hidden, None

    def _keeps_bits(self, rows: Tensor) -> bool:
        """Whether the bits of a row are to depend on that row alone."""
        return self.exact or not rows.is_cuda

    def _add_rows(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """Adds the adapter's product of x [T, K] to that of the base [T, N], in place."""
        inner = linear(self._by_entry(x)[:, self.first :], halves.down)
        self._by_entry(product)[:, self.first :] += linear(inner, halves.up)

    def _begin(self, x: Tensor, halves: Halves, into: Tensor | None = None) -> Callable[..., None]:
        """Begins the adapter's product of x [T, K] in the second stream, and returns what ends it.

        into: [T, N], to which the product is added there. By default it is added by the call that ends it, to its
            argument.
        """
        main, rows = torch.cuda.current_stream(), slice(self.first if self.entries == 1 else 0, None)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            inner = product_of(x[rows], halves.down)
            if self.first and self.entries > 1:
                self._by_entry(inner)[:, : self.first] = 0
            if into is not None:
                into[rows].addmm_(inner, halves.up.t())
            update = product_of(inner, halves.up) if into is None else None

        def finish(product: Tensor | None = None) -> None:
            main.wait_stream(self.side)
            if product is not None:
                product[rows] += update

        return finish

    def _by_entry(self, x: Tensor) -> Tensor:
        return x.view(self.entries, -1, x.shape[-1])
