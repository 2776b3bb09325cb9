"""Muon for the matrices of a drafter, and AdamW for its other parameters, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients
STEPS = 5


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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon if parameter.ndim == 2 else self._adam
                parameter.sub_(group["lr"] * update(parameter, group))

    def _muon(self, parameter: nn.Parameter, group: dict) -> Tensor:
        state, beta = self.state[parameter], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - beta)
        update = parameter.grad.lerp(state["momentum"], beta)
        if isinstance(update, DTensor):
            whole = orthogonalised(update.full_tensor())
            update = distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
        else:
            update = orthogonalised(update)
        return update * (0.2 * math.sqrt(max(parameter.shape)))

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


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix, by five Newton-Schulz steps: its singular values are between 0.7 and 1.2."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.clone()
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
