"""A rank's part of tensors that the ranks of a run share, and sums over ranks that gradients pass through."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has: the whole, if it is not shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_halves(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's parts of the two halves of an adapter of one linear layer.

    Where one of them is divided among ranks, each rank's products give a part of the gradient of the other.
    """
    if not isinstance(a, DTensor):
        return a, b
    group = a.device_mesh.get_group()
    of_a, of_b = local(a), local(b)
    if b.placements[0].is_shard():
        of_a = with_summed_gradient(of_a, group)
    if a.placements[0].is_shard():
        of_b = with_summed_gradient(of_b, group)
    return of_a, of_b


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' tensors. Every rank goes on with it in the same way, and has its whole gradient."""
    return _Summed.apply(x, group)


def with_summed_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """A tensor that all ranks have and that each uses for a part of a result, so that their gradients are summed."""
    return _WithSummedGradient.apply(x, group)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _WithSummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
