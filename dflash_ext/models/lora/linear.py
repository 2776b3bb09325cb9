"""A frozen linear layer with a trained low-rank update, in as few products and passes over memory as it takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + bias + scale * (x A^T) B^T``. Differentiable in x, A and B; weight and bias are frozen.

    For the backward, x and its product with A are kept. Products are in the dtype of the weight, whatever that of A and
    B. Sums of two products are made by the second one, so that nothing is written in between.

    Args:
        x: [..., inputs]. weight: [outputs, inputs]. a: [rank, inputs]. b: [outputs, rank].
    """
    return _LoraLinear.apply(x, weight, bias, a, b, scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dtype = weight.dtype
        rows, low, high = x.flatten(0, -2).to(dtype), a.to(dtype), (b if scale == 1 else b * scale).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            inner = linear(rows, low)
            output = linear(rows, weight, bias).addmm_(inner, high.T)
        ctx.save_for_backward(rows, inner, weight, low, high)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (x.dtype, a.dtype, b.dtype)
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        rows, inner, weight, low, high = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        of_x, of_a, of_b = ctx.dtypes
        grad = grad.flatten(0, -2).to(weight.dtype)
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            grad_inner = grad @ high
            if needs_x:
                grad_x = (grad @ weight).addmm_(grad_inner, low).view(ctx.shape).to(of_x)
            if needs_a:
                grad_a = _product(grad_inner.T, rows, of_a)
            if needs_b:
                grad_b = _product(grad.T, inner, of_b)
                if ctx.scale != 1:
                    grad_b.mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y, written in this dtype."""
    if x.is_cuda and dtype == torch.float32 != x.dtype:
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)
