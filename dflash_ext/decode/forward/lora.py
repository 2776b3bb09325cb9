"""A LoRA adapter beside the packed products of a forward: on some rows of each entry, without a merged weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...models import Target
from ...models.lora import LoraAdapter
from ...ops import linear


@dataclass(frozen=True)
class Halves:
    """The adapter of one packed product: it adds ``x @ down.T @ up.T``.

    down: [R, K], the A halves of the projections one below the other; R is the sum of their ranks.
    up: [N, R], the scaled B halves, each in the rows and columns of its projection, with zeros elsewhere.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class LayerHalves:
    """The adapter of one layer's products, by the names of `LayerWeights`; None for one that has none."""

    qkv: Halves | None = None
    out: Halves | None = None
    gate_up: Halves | None = None
    down: Halves | None = None


NO_HALVES = LayerHalves()


@dataclass(frozen=True)
class Adapted:
    """An adapter that acts on the rows from `first` on of each entry. The rows before them keep their bits.

    entries: the number of entries of the batch, each with as many rows.
    """

    layers: Sequence[LayerHalves]
    first: int = 0
    entries: int = 1

    def on(self, first: int, entries: int) -> Adapted:
        """The same adapter on other rows."""
        return replace(self, first=first, entries=entries)

    def add(self, product: Tensor, x: Tensor, halves: Halves) -> None:
        """Adds to the product [T, N] of rows x [T, K], in place."""
        if product.is_cuda:
            rows = slice(self.first if self.entries == 1 else 0, None)
            inner = nn.functional.linear(x[rows], halves.down)
            if self.first and self.entries > 1:
                self._by_entry(inner)[:, : self.first] = 0
            product[rows].addmm_(inner, halves.up.t())
        else:  # by products whose rows do not depend on each other
            inner = linear(self._by_entry(x)[:, self.first :], halves.down)
            self._by_entry(product)[:, self.first :] += linear(inner, halves.up)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that keep their bits, and the others, [rows, K] each."""
        x = self._by_entry(x)
        return x[:, : self.first].flatten(0, 1), x[:, self.first :].flatten(0, 1)

    def joined(self, kept: Tensor, others: Tensor) -> Tensor:
        """The rows [T, N] of both parts in their places."""
        width = kept.shape[-1]
        parts = (part.view(self.entries, -1, width) for part in (kept, others))
        return torch.cat(list(parts), dim=1).flatten(0, 1)

    def on_others(self) -> Adapted:
        """The adapter for the second part of `split`, all rows of which it acts on."""
        return self.on(0, 1)

    def _by_entry(self, x: Tensor) -> Tensor:
        return x.view(self.entries, -1, x.shape[-1])


def halves_of(adapter: LoraAdapter, target: Target) -> list[LayerHalves]:
    """The adapter of each layer's packed products, for a target that `has_lean_forward`, in the target's dtype."""
    names = {module: name for name, module in target.model.named_modules()}
    like = target.head

    def halves(*projections: nn.Linear) -> Halves | None:
        paths = [names[projection] for projection in projections]
        pairs = {path: adapter.halves(path) for path in paths if path in adapter.paths}
        if not pairs:
            return None
        down = torch.cat([a for a, _ in pairs.values()]).detach().to(like.device, like.dtype)
        up = down.new_zeros(sum(p.out_features for p in projections), len(down))
        row = column = 0
        for path, projection in zip(paths, projections, strict=True):
            if path in pairs:
                _, b = pairs[path]
                up[row : row + len(b), column : column + b.shape[1]] = b.detach() * adapter.scale
                column += b.shape[1]
            row += projection.out_features
        return Halves(down, up)

    def of_layer(attention: nn.Module, mlp: nn.Module) -> LayerHalves:
        return LayerHalves(
            qkv=halves(attention.q_proj, attention.k_proj, attention.v_proj),
            out=halves(attention.o_proj),
            gate_up=halves(mlp.gate_proj, mlp.up_proj),
            down=halves(mlp.down_proj),
        )

    return [of_layer(layer.self_attn, layer.mlp) for layer in target.layers]
