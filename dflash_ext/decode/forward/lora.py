"""The halves of a LoRA adapter, packed as the products of a forward are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...models import Target
from ...models.lora import LoraAdapter
from ...ops.layer import HALVES_COLUMNS, HALVES_RANKS
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

    down: [R, K], the A halves of the projections one below the other; R is the sum of their ranks.
    up: [N, R], the scaled B halves, each in the rows and columns of its projection, with zeros elsewhere.
    sizes: the rows of each projection in `up`. places: its first column there, None for one without an adapter.
    """

    down: Tensor
    up: Tensor
    sizes: tuple[int, ...]
    places: tuple[int | None, ...]


@dataclass(frozen=True)
class JointHalves:
    """The adapter of one packed product in the form of `add_halves`.

    weight: [N + R, K], the base's weight and below it the A halves, so that one product reads both.
    own: [N, r], in the rows of each projection its own scaled B half, with zeros for one without an adapter.
    ends: the end of each projection in the columns of the product. places: where its half A begins behind them.
    """

    weight: Tensor
    own: Tensor
    ends: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class LayerHalves:
    """The adapter of one layer's products, by the names of `LayerWeights`; None for one that has none."""

    qkv: Halves | JointHalves | None = None
    out: Halves | JointHalves | None = None
    gate_up: Halves | JointHalves | None = None
    down: Halves | JointHalves | None = None


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
        places: list[int | None] = []
        for path, projection in zip(paths, projections, strict=True):
            places.append(column if path in pairs else None)
            if path in pairs:
                _, b = pairs[path]
                up[row : row + len(b), column : column + b.shape[1]] = b.detach() * adapter.scale
                column += b.shape[1]
            row += projection.out_features
        return Halves(down, up, tuple(p.out_features for p in projections), tuple(places))

    return [LayerHalves(**{part: halves(_projections(layer, part)) for part in PROJECTIONS}) for layer in target.layers]


def join(layers: list[LayerWeights], halves: Sequence[LayerHalves], rank: int, target: Target) -> list[LayerHalves]:
    """Puts the A halves of an adapter of this rank below the weights that they belong to, layer by layer, and gives the
    joint halves. Those that `add_halves` does not take stay apart.

    The model exists once: its own parameters and the entries of `layers`, which are replaced, become views of the joint
    matrices.
    """
    joined = []
    for index, (module, of_layer) in enumerate(zip(target.layers, halves, strict=True)):
        weights, changes = {}, {}
        for part in PROJECTIONS:
            pair = getattr(of_layer, part)
            if pair is None or rank > HALVES_RANKS[-1] or any(size % HALVES_COLUMNS for size in pair.sizes):
                continue
            weight = getattr(layers[index], part)
            changes[part] = joint = _joint(weight, pair, rank)
            repoint([projection.weight for projection in _projections(module, part)], joint.weight)
            weights[part] = joint.weight[: len(weight)]
        layers[index] = replace(layers[index], **weights)
        joined.append(replace(of_layer, **changes))
    return joined


def _joint(weight: Tensor, halves: Halves, rank: int) -> JointHalves:
    """The halves in the next larger rank that `add_halves` takes, with zeros for what they have not."""
    wide = next(each for each in HALVES_RANKS if each >= rank)
    downs = [pad(half, (0, 0, 0, wide - rank)) for half in halves.down.split(rank)]
    own, row, places = weight.new_zeros(len(weight), wide), 0, []
    for size, place in zip(halves.sizes, halves.places, strict=True):
        places.append(0 if place is None else place // rank * wide)
        if place is not None:
            own[row : row + size, :rank] = halves.up[row : row + size, place : place + rank]
        row += size
    return JointHalves(torch.cat([weight, *downs]), own, tuple(accumulate(halves.sizes)), tuple(places))


def _projections(layer: nn.Module, part: str) -> list[nn.Linear]:
    return [layer.get_submodule(name) for name in PROJECTIONS[part]]
