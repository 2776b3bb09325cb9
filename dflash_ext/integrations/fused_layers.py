"""Fused operators in the place of modules of transformers.

The norms and gated MLPs of transformers run as a dozen kernels each, and keep what each of them reads for the backward.
The operators of `ops.trained_layer` are one kernel each and keep their inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..ops.trained_layer import gated_pair, rms_norm

Forward = Callable[[Tensor], Tensor]
_ACTIVATIONS = {type(ACT2FN["silu"]): "silu", type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh"}


def fused_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """The fused forward of every RMS norm and gated MLP in a model, whatever its family.

    What a module computes, rows of small and of large random numbers tell; some MLPs clamp the large ones alone. A
    module that computes something else has none. Of two operators the nearer one is right: where Gemma's weights are
    large, 1 more or less changes no more than a few percent, which bfloat16 may hide in a single number.
    """
    forwards = {}
    for module in model.modules():
        if found := [*_norms(module), *_gated_mlps(module)]:
            like = next(module.parameters(), torch.empty(64))  # a norm without a weight takes rows of any width
            distance, forward = min(((_distance(module, each, like), each) for each in found), key=lambda pair: pair[0])
            if distance <= 4 * torch.finfo(like.dtype).eps:
                forwards[module] = forward
    return forwards


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within it, these modules run these forwards."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _norms(module: nn.Module) -> Iterator[Forward]:
    """The forwards of an RMS norm that multiplies by its weight, by 1 + its weight, or by nothing."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(eps, float)):
        return
    if weight is None:
        yield lambda x: nn.functional.rms_norm(x, x.shape[-1:], eps=eps)
        return
    # The weight is read in each call, because FSDP puts another one in its place.
    yield lambda x: rms_norm(x, module.weight, eps=eps)
    yield lambda x: rms_norm(x, module.weight.float() + 1, eps=eps)


def _gated_mlps(module: nn.Module) -> Iterator[Forward]:
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)))
    if not (activation and all(isinstance(linear, nn.Linear) for linear in linears)):
        return
    if len(signature(module.forward).parameters) == 1:  # DiffusionGemma's self-conditioning takes two tensors
        gate, up, down = linears
        yield lambda x: down(gated_pair(gate(x), up(x), activation))


@torch.no_grad()
def _distance(module: nn.Module, forward: Forward, like: Tensor) -> float:
    """How far this forward's results are from the module's own on average, as a share of the latter, in the worse of
    two rows. They have the width, the device and the dtype of `like`."""
    rows = torch.randn(1, 2, like.shape[-1], generator=torch.Generator().manual_seed(0))
    rows[:, 1] *= 8
    rows = rows.to(like.device, like.dtype)
    want, got = module(rows).float(), forward(rows).float()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
