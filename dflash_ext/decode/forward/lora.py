"""The halves of a LoRA adapter, packed as the products of a forward are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...models import Target
from ...models.lora import LoraAdapter
from .layers import LayerWeights
from .packing import repoint

# The linear layers of a layer that are one packed product, by its name in `LayerWeights`.
PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Halves:
    """The adapter of one packed product: it adds ``x @ down.T @ up.T``.

    down: [R, K], the A halves of the projections one below the other; R is the sum of their ranks, and in a joint
        product rounded up to a multiple of 8, with zeros.
    up: [N, R], the scaled B halves, each in the rows and columns of its projection, with zeros elsewhere.
    joint: [N + R, K], the base's weight and below it `down`, so that one product reads both; None if they are apart.
    """

    down: Tensor
    up: Tensor
    joint: Tensor | None = None


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

    def halves(projections: Sequence[nn.Linear]) -> Halves | None:
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

    return [LayerHalves(**{part: halves(_projections(layer, part)) for part in PROJECTIONS}) for layer in target.layers]


def join(layers: list[LayerWeights], halves: Sequence[LayerHalves], target: Target) -> list[LayerHalves]:
    """Puts the A halves below the weights that they belong to, layer by layer, and gives the joint halves.

    The model exists once: its own parameters and the entries of `layers`, which are replaced, become views of the joint
    matrices.
    """
    joined = []
    for index, (module, of_layer) in enumerate(zip(target.layers, halves, strict=True)):
        weights, changes = {}, {}
        for part in PROJECTIONS:
            if (pair := getattr(of_layer, part)) is None:
                continue
            weight, missing = getattr(layers[index], part), -len(pair.down) % 8
            down, up = pad(pair.down, (0, 0, 0, missing)), pad(pair.up, (0, missing))
            joint = torch.cat([weight, down])
            repoint([projection.weight for projection in _projections(module, part)], joint)
            weights[part] = joint[: len(weight)]
            changes[part] = Halves(joint[len(weight) :], up, joint)
        layers[index] = replace(layers[index], **weights)
        joined.append(replace(of_layer, **changes))
    return joined


def _projections(layer: nn.Module, part: str) -> list[nn.Linear]:
    return [layer.get_submodule(name) for name in PROJECTIONS[part]]
