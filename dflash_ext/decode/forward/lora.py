"""The halves of a LoRA adapter, packed as the products of a forward are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models import Target
from ...models.lora import LoraAdapter


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
