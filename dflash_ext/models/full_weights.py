"""All weights of a language model, trained beside it, while its own weights stay as they are."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integrations.fused_layers import replaced_forwards
from ..progress import without_library_bars
from .loading import first_line
from .target import Target

# The weights of a module by their names in it.
Own = Mapping[str, Tensor]


class FullWeights(nn.Module):
    """Copies of the weights of a language model in float32: of its embedding, its layers and its head.

    Towers of other modalities have none. The copies act on the model within `applied`, in its own dtype, and everywhere
    else the model is the base.

    Args:
        weights: by their paths in the model. Of weights that are tied, there is one.
        layers: the paths of the decoder layers.

    Attributes:
        paths: in the order of `weights`.

    Raises:
        ValueError: a weight is quantised.
    """

    def __init__(self, weights: Mapping[str, Tensor], layers: Sequence[str]):
        super().__init__()
        if quantised := [path for path, weight in weights.items() if not weight.is_floating_point()]:
            raise ValueError(f"full weights cannot be trained: {quantised[0]} is quantised")
        self.paths, self.layers = tuple(weights), tuple(layers)
        self.weights = nn.ParameterList(weight.detach().float().clone() for weight in weights.values())

    @classmethod
    def for_target(cls, target: Target) -> FullWeights:
        """The base's own weights, as training begins with them."""
        parts = target.decoder, target.model.get_output_embeddings()
        inside = {id(weight) for part in parts for weight in part.parameters()}
        weights = {path: weight for path, weight in target.model.named_parameters() if id(weight) in inside}
        of_layers = set(target.layers)
        return cls(weights, [path for path, module in target.model.named_modules() if module in of_layers])

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this from other ways of training a model."""
        return {"adapted": list(self.paths)}

    def weight_of(self, target: Target, module: nn.Module) -> Tensor:
        """The trained weight of the target's embedding or head, in the target's dtype."""
        model = target.model
        own = {id(model.get_parameter(path)): weight for path, weight in zip(self.paths, self.weights, strict=True)}
        return own[id(module.weight)].to(module.weight.dtype)

    @without_library_bars()
    def save(self, folder: str | os.PathLike, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        """Writes the model with these weights as transformers does, in float32 by default."""
        copied = copy.deepcopy(model).to(dtype or torch.float32)
        for path, weight in zip(self.paths, self.weights, strict=True):
            copied.get_parameter(path).data.copy_(weight.detach())
        copied.save_pretrained(folder)

    def merged(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that a model has in the place of its own, by path."""
        pairs = zip(self.paths, self.weights, strict=True)
        return {path: weight.detach().to(model.get_parameter(path)) for path, weight in pairs}

    @contextmanager
    def applied(self, model: nn.Module, rows: None = None) -> Iterator[None]:
        """Within it, the decoder of the model runs with these weights, in all rows of its forward.

        Layers get theirs in each call, so that a backward that computes a layer again (`recomputed`) has them, too.
        """
        inside: dict[str, dict[str, Tensor]] = {layer: {} for layer in self.layers}
        outside: dict[str, Tensor] = {}
        for path, weight in zip(self.paths, self.weights, strict=True):
            weight = weight.to(model.get_parameter(path).dtype)
            layer = next((layer for layer in self.layers if path.startswith(f"{layer}.")), None)
            if layer is None:
                outside[path] = weight
            else:
                inside[layer][path.removeprefix(f"{layer}.")] = weight
        layers = {model.get_submodule(layer): own for layer, own in inside.items()}
        forwards = {layer: partial(_with_weights, layer, layer.forward, own) for layer, own in layers.items()}
        with _replaced(model, outside), replaced_forwards(forwards):
            yield


def _with_weights(module: nn.Module, forward: Callable, own: Own, *args, **kwargs) -> Any:
    """What a module's forward gives with other weights."""
    with _replaced(module, own):
        return forward(*args, **kwargs)


@contextmanager
def _replaced(module: nn.Module, own: Own) -> Iterator[None]:
    """Within it, a module has these tensors as its parameters. Gradients reach them."""
    with ExitStack() as before:
        for path, tensor in own.items():
            owner, _, name = path.rpartition(".")
            parameters = module.get_submodule(owner)._parameters
            before.callback(parameters.__setitem__, name, parameters[name])
            parameters[name] = tensor
        yield


@without_library_bars()
def load_full_weights(folder: str | os.PathLike, target: Target) -> FullWeights:
    """Reads a model of the target's class and shapes, which `save_pretrained` of transformers has written, on the CPU.

    Raises:
        ValueError: there is none, or it does not fit.
    """
    try:
        model, info = type(target.model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ValueError(f"cannot read the full weights in '{folder}': {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"the full weights in '{folder}' are not whole: {missing[0]} is missing")
    weights = FullWeights.for_target(Target(model))
    for path, weight in zip(weights.paths, weights.weights, strict=True):
        needed = target.model.get_parameter(path).shape
        if weight.shape != needed:
            raise ValueError(f"the full weights in '{folder}' do not fit: {path} is {[*weight.shape]}, not {[*needed]}")
    return weights
