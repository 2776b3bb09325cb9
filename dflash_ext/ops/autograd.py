"""What the operators share in autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_LIBRARY = torch.library.Library("dflash_ext", "IMPL")


def has_no_gradient(op: str) -> None:
    """Makes autograd ignore ``dflash_ext::<op>``: its results never require a gradient."""
    _LIBRARY.impl(op, torch.library.fallthrough_kernel, "Autograd")


def refuse_second_derivative(op: str) -> None:
    """Makes autograd raise if it would have to differentiate ``op``'s backward, ``dflash_ext::<op>_backward``.

    Without a formula, autograd would treat the gradient as a constant: a gradient penalty would silently do nothing.
    """

    def refuse(ctx, *grads) -> NoReturn:
        raise RuntimeError(f"{op}: its gradient has no derivative; first derivatives are supported")

    torch.library.register_autograd(f"dflash_ext::{op}_backward", refuse)


def first_derivatives(op: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple:
    """The gradients that a backward in Python made of ``inputs``. Autograd raises if it has to differentiate them."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    return tuple(None if grad is None else _FirstDerivative.apply(op, grad, *inputs) for grad in grads)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, grad, *inputs):
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_) -> NoReturn:
        raise RuntimeError(f"{ctx.op}: its gradient has no derivative; first derivatives are supported")


def refuse_forward_mode(op: str, *inputs: Tensor | None) -> None:
    """Raises RuntimeError for an input with a tangent. The dispatcher would drop it, so the result's would be 0."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise RuntimeError(f"{op}: forward-mode derivatives are not supported")
