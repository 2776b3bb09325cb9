"""The rotary embedding of queries and keys inside the models of transformers, in fewer kernels.

The functions of transformers negate, join, multiply and add, and keep what each of these reads for the backward. This
one makes three passes over a tensor in either direction and keeps the angles alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"


def rotating_modules(model: nn.Module) -> list[ModuleType]:
    """The Python modules of a model's layers whose `apply_rotary_pos_emb` computes what `rotated` does.

    Each function is compared with `rotated` on random numbers.
    """
    names = sorted({type(part).__module__ for part in model.modules() if hasattr(part, "num_key_value_groups")})
    return [sys.modules[name] for name in names if _gives(getattr(sys.modules[name], NAME, None))]


@contextmanager
def replaced_rotation(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Within it, these modules rotate by `rotated`."""
    own = [getattr(module, NAME) for module in modules]
    for module in modules:
        setattr(module, NAME, rotated)
    try:
        yield
    finally:
        for module, function in zip(modules, own, strict=True):
            setattr(module, NAME, function)


def replaced_now(modules: Sequence[ModuleType]) -> list[ModuleType]:
    """Those of these modules that rotate by `rotated` at the moment."""
    return [module for module in modules if getattr(module, NAME) is rotated]


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated. Dimension i is rotated together with i + D / 2. Differentiable in q and k.

    Args:
        q, k: [B, heads, L, D], or with the dimension of heads elsewhere.
        cos, sin: [B, L, D], in which the halves are equal.
        unsqueeze_dim: the dimension of heads.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    out, sin = x * cos, sin[..., :half]
    out[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return out


def _gives(function: Callable | None) -> bool:
    """Whether a function rotates as `rotated` does, and refuses angles for a part of the dimensions as that does."""
    q, k, angles = torch.randn(3, 1, 2, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    halves = angles[:, 0, :, :4]
    angles = torch.cat([halves, halves], dim=-1)
    given = q, k, angles.cos(), angles.sin()
    try:
        same = all(torch.allclose(*pair, atol=1e-5) for pair in zip(function(*given), rotated(*given), strict=True))
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments
        return False
    try:
        function(q, k, halves.cos(), halves.sin())
    except RuntimeError:
        return same
    return False
