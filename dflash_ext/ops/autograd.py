"""What the operators share in autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_LIBRARY = torch.library.Library("dflash_ext", "IMPL")


def has_no_gradient(op: str) -> None:
    """Makes autograd ignore ``dflash_ext::<op>``: its results never require a gradient."""
    _LIBRARY.impl(op, torch.library.fallthrough_kernel, "Autograd")


def differentiable(op: str, keep: Callable, backward: Callable, vmap: Callable | None = None) -> Callable:
    """Gives ``dflash_ext::<op>`` a gradient, also under the transforms of torch.func. Returns how to call the operator.

    Args:
        keep: ``keep(ctx, inputs, output)`` saves what the backward needs.
        backward: ``backward(ctx, *grads)`` returns the gradients of the inputs.
        vmap: a rule for ``torch.library.register_vmap`` that takes the operator first. By default the operator is
            called for one entry at a time.
    """
    native = getattr(torch.ops.dflash_ext, op).default
    torch.library.register_autograd(native, backward, setup_context=keep)
    torch.library.register_vmap(native, partial(vmap or _one_by_one, native))
    # torch.func cannot look through what register_autograd makes, but through such a class.
    members = {"forward": native, "setup_context": keep, "backward": backward}
    members = {name: staticmethod(member) for name, member in members.items()} | {"generate_vmap_rule": True}
    transformed = type(f"{op}_of_torch_func", (torch.autograd.Function,), members)

    def call(*inputs):
        is_transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return transformed.apply(*inputs) if is_transformed else native(*inputs)

    return call


def differentiable_once(op: str, vmap: Callable | None = None) -> Callable:
    """`differentiable` for ``dflash_ext::<op>_backward``, of which autograd raises if it has to differentiate it.

    Without a formula, autograd would treat the gradient as a constant: a gradient penalty would silently do nothing.
    """

    def refuse(ctx, *grads) -> NoReturn:
        raise RuntimeError(f"{op}: its gradient has no derivative; first derivatives are supported")

    return differentiable(f"{op}_backward", lambda ctx, inputs, output: None, refuse, vmap)


def _one_by_one(native: Callable, info, in_dims: tuple, *inputs) -> tuple:
    def entry(i: int):
        return native(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))

    results = [entry(i) for i in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


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
