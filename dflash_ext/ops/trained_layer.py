"""What stands between the matrix products of a transformer layer when a model is trained.

Each operator keeps its inputs alone for the backward, and computes everything else again there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..native import load
from .autograd import differentiable, differentiable_once, refuse_forward_mode
from .devices import autocast
from .layer import ACTIVATIONS
from .loss import real_dtype

load()
_ops = torch.ops.dflash_ext


def rms_norm(
    x: Tensor, weight: Tensor, *, update: Tensor | None = None, eps: float = 1e-6
) -> Tensor | tuple[Tensor, Tensor]:
    """The RMS norm of ``x``, or of ``x + update``. Differentiable.

    Args:
        x: ``[..., H]`` floating.
        weight: ``[H]``; the norm has the dtype of ``x``, whatever that of the weight.
        update: ``[..., H]``, what a sublayer adds to the residual stream ``x``.
        eps: added to the mean square.

    Returns:
        The norm, ``[..., H]``; with update first the sum, which is rounded to its dtype before it is normalised. Sums
        over a row are in float32, and in float64 for float64.

    Raises RuntimeError for tensors that do not fit together, and for a second derivative.
    """
    refuse_forward_mode("rms_norm", x, weight, update)
    if update is not None:
        dtype = torch.promote_types(x.dtype, update.dtype)
        x, update = x.to(dtype), update.to(dtype)
    if x.is_cuda and x.dtype == torch.float64:
        total = x if update is None else x + update
        normed = reference.rms_norm(total, weight, eps)
        return normed if update is None else (total, normed)
    rows = _rows(x)
    total, normed = _rms_norm(rows, None if update is None else _rows(update), weight.to(x.dtype), eps)
    normed = normed.view(x.shape)
    return normed if update is None else (total.view(x.shape), normed)


def rotate_heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The RMS norm of every head, and then its rotary embedding. Differentiable in x and weight.

    Args:
        x: ``[B, L, heads, D]`` floating; D even, at most 512.
        weight: ``[D]``, the weight of the norm.
        cos, sin: ``[B, L, at least D / 2]``, or 1 in the place of B. Dimension i is rotated together with i + D / 2, by
            the angle of entry i.
        eps: added to the mean square.

    Returns:
        ``[B, L, heads, D]`` of x's dtype, rounded once.

    Raises RuntimeError for tensors that do not fit together, and for a second derivative.
    """
    refuse_forward_mode("rotate_heads", x, weight)
    if x.is_cuda and x.dtype == torch.float64:
        return reference.rotate_heads(x, weight, cos, sin, eps)
    real = real_dtype(x)
    tables = (table.detach().to(real).expand(*x.shape[:2], -1).flatten(0, 1).contiguous() for table in (cos, sin))
    return _rotate_heads(x.flatten(0, 1).contiguous(), weight.to(real), *tables, eps).view(x.shape)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, activation: str = "silu") -> Tensor:
    """``(activation(gate) * up) @ weight.T``, the end of a gated MLP, which keeps no more than gate and up.

    Args:
        gate, up: ``[..., I]`` floating.
        weight: ``[H, I]``. Under autocast all are cast.
        activation: "silu" (SwiGLU) or "gelu_tanh" (Gemma's GELU).

    Returns:
        ``[..., H]``.

    Raises ValueError for another activation, and RuntimeError for tensors that do not fit together and for a second
    derivative.
    """
    _check_activation("gated_linear", activation)
    refuse_forward_mode("gated_linear", gate, up, weight)
    gate, up, weight = autocast(gate, up, weight)
    if gate.is_cuda and gate.dtype == torch.float64:
        return reference.gated_linear(gate, up, weight, activation)
    out = _linear_of_pair(_rows(gate), _rows(up), weight, ACTIVATIONS.index(activation))
    return out.view(*gate.shape[:-1], len(weight))


def gated_pair(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``activation(gate) * up``, which keeps no more than gate and up.

    It is for gated MLPs whose last product is not a plain one; `gated_linear` has that product, too.

    Args:
        gate, up: ``[..., I]`` floating, of one dtype.
        activation: as in `gated_linear`.

    Raises ValueError for another activation, and RuntimeError for tensors that do not fit together and for a second
    derivative.
    """
    _check_activation("gated_pair", activation)
    refuse_forward_mode("gated_pair", gate, up)
    if gate.is_cuda and gate.dtype == torch.float64:
        return reference.gated_pair(gate, up, activation)
    return _gated_pair(_rows(gate), _rows(up), ACTIVATIONS.index(activation)).view(gate.shape)


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; {' and '.join(map(repr, ACTIVATIONS))} are supported")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


# ----------------------------------------------------------------------- rms_norm


@torch.library.register_fake("dflash_ext::rms_norm")
def _(x, update, weight, eps):
    return x.new_empty(0 if update is None else len(x), x.shape[1]), torch.empty_like(x)


@torch.library.register_fake("dflash_ext::rms_norm_backward")
def _(grad, grad_total, x, weight, eps):
    return torch.empty_like(x), _parts(x)


def _parts(x: Tensor) -> Tensor:
    """The sums of a weight's gradient over parts of the rows, as csrc/ops/layer_gradients.cpp divides them."""
    return x.new_empty(64 if x.device.type == "cpu" else 512, x.shape[-1], dtype=real_dtype(x))


def _keep_norm(ctx, inputs, output):
    x, update, weight, ctx.eps = inputs
    ctx.has_update = update is not None
    if not ctx.has_update:
        ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if ctx.has_update else x, weight)


def _norm_backward(ctx, grad_total, grad):
    total, weight = ctx.saved_tensors
    if grad is None:
        return grad_total, grad_total if ctx.has_update else None, None, None
    grad_total = grad_total.contiguous() if ctx.has_update and grad_total is not None else None
    grad_x, parts = _rms_norm_backward(grad.contiguous(), grad_total, total, weight, ctx.eps)
    grad_weight = parts.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
    return grad_x, grad_x if ctx.has_update else None, grad_weight, None


_rms_norm_backward = differentiable_once("rms_norm")
_rms_norm = differentiable("rms_norm", _keep_norm, _norm_backward)


# ------------------------------------------------------------------- rotate_heads


@torch.library.register_fake("dflash_ext::rotate_heads")
def _(x, weight, cos, sin, eps):
    return torch.empty_like(x)


@torch.library.register_fake("dflash_ext::rotate_heads_backward")
def _(grad, x, weight, cos, sin, eps):
    return torch.empty_like(x), _parts(x)


def _keep_heads(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _heads_backward(ctx, grad):
    grad_x, parts = _rotate_heads_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return grad_x, parts.sum(0), None, None, None


_rotate_heads_backward = differentiable_once("rotate_heads")
_rotate_heads = differentiable("rotate_heads", _keep_heads, _heads_backward)


# -------------------------------------------------------- gated_pair, gated_linear


@torch.library.register_fake("dflash_ext::gated_pair")
def _(gate, up, activation):
    return torch.empty_like(gate)


@torch.library.register_fake("dflash_ext::gated_pair_backward_")
def _(grad, other, gate, up, activation):
    return None


@torch.library.custom_op("dflash_ext::gated_pair_backward", mutates_args=())
def _both_gradients(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = grad.clone(memory_format=torch.contiguous_format), torch.empty_like(up)
    _ops.gated_pair_backward_(grad_gate, grad_up, gate, up, activation)
    return grad_gate, grad_up


@_both_gradients.register_fake
def _(grad, gate, up, activation):
    return torch.empty_like(gate), torch.empty_like(up)


def _keep_both(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gated_backward(ctx, grad):
    return *_gated_pair_backward(grad, *ctx.saved_tensors, ctx.activation), None


_gated_pair_backward = differentiable_once("gated_pair")
_gated_pair = differentiable("gated_pair", _keep_both, _gated_backward)


@torch.library.custom_op("dflash_ext::gated_linear", mutates_args=())
def _gated_linear(gate: Tensor, up: Tensor, weight: Tensor, activation: int) -> Tensor:
    return _ops.gated_pair(gate, up, activation) @ weight.T


@torch.library.custom_op("dflash_ext::gated_linear_backward", mutates_args=())
def _gated_linear_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, activation: int, train_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and weight (empty unless it is trained), without any memory beside them."""
    grad_up = _ops.gated_pair(gate, up, activation)  # at first the input of the product
    grad_weight = grad.T @ grad_up if train_weight else weight.new_empty(0)
    grad_gate = grad @ weight  # at first the gradient of the product's input
    _ops.gated_pair_backward_(grad_gate, grad_up, gate, up, activation)
    return grad_gate, grad_up, grad_weight


@_gated_linear.register_fake
def _(gate, up, weight, activation):
    return gate.new_empty(len(gate), len(weight))


@_gated_linear_backward.register_fake
def _(grad, gate, up, weight, activation, train_weight):
    grad_weight = torch.empty_like(weight) if train_weight else weight.new_empty(0)
    return torch.empty_like(gate), torch.empty_like(up), grad_weight


def _pair_backward(ctx, grad):
    train_weight = ctx.needs_input_grad[2]
    grads = _linear_backward(grad.contiguous(), *ctx.saved_tensors, ctx.activation, train_weight)
    return *grads[:2], grads[2] if train_weight else None, None


_linear_backward = differentiable_once("gated_linear")
_linear_of_pair = differentiable("gated_linear", _keep_both, _pair_backward)
