"""A LoRA adapter (arXiv 2106.09685) beside a causal LM, whose own modules and weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations.fused_layers import replaced_forwards
from ..target import Target
from .linear import lora_linear
from .split import local_halves
from .targets import linear_paths


class LoraAdapter(nn.Module):
    """The pairs of low-rank matrices of a set of linear layers.

    The adapter is no part of the model. It acts on it within `applied`, and everywhere else the model is the base.

    Args:
        shapes: the outputs and inputs of each linear layer, by its full path in the model.
        rank: the inner dimension of every pair.
        alpha: the update of a linear layer is multiplied by `alpha / rank`. The default is the rank.

    Attributes:
        paths: the linear layers' paths, in the order of `shapes`.
        scale: alpha / rank.

    Raises:
        ValueError: the rank is below 1.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float | None = None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"the rank of an adapter is {rank}: at least 1 is needed")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; a positive number is needed")
        self.scale = self.alpha / rank
        self.shapes, self.paths = dict(shapes), tuple(shapes)
        self._index = {path: index for index, path in enumerate(self.paths)}
        self.lora_a = nn.ParameterList(torch.empty(rank, inputs) for _, inputs in shapes.values())
        self.lora_b = nn.ParameterList(torch.zeros(outputs, rank) for outputs, _ in shapes.values())
        for a in self.lora_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as PEFT does

    @classmethod
    def for_target(
        cls, target: Target, *, targets: str | Sequence[str] = "all", rank: int = 64, alpha: float | None = None
    ) -> LoraAdapter:
        """A new adapter in float32 on the CPU, which changes nothing until it is trained; `linear_paths` has the
        meaning of `targets`."""
        modules = ((path, target.model.get_submodule(path)) for path in linear_paths(target, targets))
        return cls({path: (module.out_features, module.in_features) for path, module in modules}, rank, alpha)

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this adapter from others that can be trained on the same model."""
        return {"rank": self.rank, "alpha": self.alpha, "adapted": list(self.paths)}

    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of a model's linear layers with the adapter's products added to them, by path."""
        found = {}
        for path in self.paths:
            weight = model.get_submodule(path).weight
            a, b = (half.detach().to(weight.device, torch.float32) for half in self.halves(path))
            found[f"{path}.weight"] = (weight.float() + self.scale * (b @ a)).to(weight.dtype)
        return found

    def weight_of(self, target: Target, module: nn.Module) -> Tensor:
        """The weight of the target's embedding or head, which no adapter changes."""
        return target.weight_of(module)

    def halves(self, path: str) -> tuple[Tensor, Tensor]:
        """The matrices of a linear layer: A [rank, inputs] and B [outputs, rank]."""
        index = self._index[path]
        return self.lora_a[index], self.lora_b[index]

    @torch.no_grad()
    def start_from(self, other: LoraAdapter) -> None:
        """Takes over the updates of another adapter, in the best approximation that this one's rank allows.

        Linear layers that this adapter does not have keep no update, and those that the other one does not have keep
        theirs.

        Raises:
            ValueError: a linear layer that both have is of another shape.
        """
        for path in set(self.paths) & set(other.paths):
            ours, theirs = self.shapes[path], other.shapes[path]
            if ours != theirs:
                raise ValueError(f"{path} has the shape {ours}, and that of the adapter to start from {theirs}")
            (a, b), (theirs_a, theirs_b) = self.halves(path), (half.float() for half in other.halves(path))
            # The singular values of B A are those of the product of the factors' triangles.
            left, r_left = torch.linalg.qr(theirs_b * (other.scale / self.scale))
            right, r_right = torch.linalg.qr(theirs_a.T)
            u, sizes, v = torch.linalg.svd(r_left @ r_right.T)
            kept = min(self.rank, len(sizes))
            root = sizes[:kept].sqrt()
            b.zero_()[:, :kept] = left @ (u[:, :kept] * root)
            a[:kept] = (right @ (v[:kept].T * root)).T

    @contextmanager
    def applied(self, model: nn.Module, rows: Tensor | None = None) -> Iterator[None]:
        """Within it, every linear layer of the adapter puts out `W x + scale * B A x`.

        Args:
            rows: bool [B, L], the rows of the forward on which the adapter acts. The others keep the bits that the base
                gives them. None is for all rows.
        """
        modules = map(model.get_submodule, self.paths)
        forwards = {
            module: partial(_adapted, module, module.forward, *local_halves(a, b), self.scale, rows)
            for module, a, b in zip(modules, self.lora_a, self.lora_b, strict=True)
        }
        with replaced_forwards(forwards):
            yield


def _adapted(
    module: nn.Module, forward: Callable, a: Tensor, b: Tensor, scale: float, rows: Tensor | None, x: Tensor
) -> Tensor:
    """The output of a linear layer, whose own is `forward`, with its update."""
    if rows is None and type(module) is nn.Linear:
        return lora_linear(x, module.weight, module.bias, a, b, scale)
    return with_update(forward(x), x, a, b, scale, rows)


def with_update(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, rows: Tensor | None) -> Tensor:
    """The output of a linear layer with the update of an adapter, for the layer's input `x`; `rows` as in `applied`."""
    inner = nn.functional.linear(x.to(output.dtype), a.to(output.dtype))
    updated = output + scale * nn.functional.linear(inner, b.to(output.dtype))
    return updated if rows is None else torch.where(rows.unsqueeze(-1), updated, output)
