"""Muon for the matrices of a drafter, and AdamW for its other parameters, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients
STEPS = 5
AT_A_TIME = 2**24  # the most numbers in a batch of matrices


class MuonWithAdamW(torch.optim.Optimizer):
    """Orthogonalised momentum (Muon, Jordan 2024) for parameters of two dimensions, AdamW for all others.

    A matrix's update is scaled to the root mean square of AdamW's, 0.2 (Liu et al., arXiv 2502.16982). So one learning
    rate serves both, and an AdamW recipe can be used as it is.

    Args:
        params: parameters, or groups of them as torch's optimizers take them.
        lr: the learning rate.
        momentum: of Muon, with Nesterov's look-ahead.
        betas, eps: of AdamW.
        weight_decay: decoupled, for both.

    An update needs the whole matrix. One that is sharded is gathered for it on every rank, and each keeps its shard.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            for parameter in moved:
                if parameter.ndim != 2:
                    parameter.sub_(group["lr"] * self._adam(parameter, group))
            for matrices in _of_equal_shape([parameter for parameter in moved if parameter.ndim == 2]):
                self._muon(matrices, group)

    def _muon(self, matrices: Sequence[nn.Parameter], group: dict) -> None:
        """Steps matrices of one shape, in one batch, because many small products would be bound by their launches."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        grads, momenta = [each.grad for each in matrices], [self.state[each]["momentum"] for each in matrices]
        beta = group["momentum"]
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        # The copies are changed in place, because torch 2.11 interpolates sharded tensors in no other way.
        updates = [grad.clone() for grad in grads]
        torch._foreach_lerp_(updates, momenta, beta)
        whole = torch.stack([each.full_tensor() if isinstance(each, DTensor) else each for each in updates])
        updates = orthogonalised(whole).unbind()
        if isinstance(matrices[0], DTensor):
            updates = [
                distribute_tensor(update, matrix.device_mesh, matrix.placements, src_data_rank=None)
                for matrix, update in zip(matrices, updates, strict=True)
            ]
        scale = 0.2 * math.sqrt(max(matrices[0].shape))
        torch._foreach_add_(matrices, updates, alpha=-group["lr"] * scale)

    def _adam(self, parameter: nn.Parameter, group: dict) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = float(state["step"])
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].lerp_(parameter.grad.square(), 1 - beta2)
        root = (state["square"] / (1 - beta2**step)).sqrt()
        return state["mean"] / (1 - beta1**step) / (root + group["eps"])


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each, [..., m, n], by five Newton-Schulz steps: its singular values are
    between 0.7 and 1.2."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.clone()
    if is_tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def _of_equal_shape(matrices: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Puts matrices of one shape together, up to a bound on their numbers."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        count = max(1, AT_A_TIME // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))
