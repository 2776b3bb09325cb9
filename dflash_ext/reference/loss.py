"""Weighted cross-entropy in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import entropy_of, softcapped, widened


class CrossEntropy(NamedTuple):
    """The result of a cross-entropy.

    Attributes:
        loss: [], or per row with reduction "none". It alone has a gradient.
        nll: the negative log-likelihood of each row's target, float32 (float64 for float64 logits).
        correct: bool per row, whether the argmax is the target.
        entropy: of each row's distribution in nats, with the dtype of nll.

    nll, correct and entropy are 0 for rows of weight 0.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor
    entropy: Tensor


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normaliser: float | Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Tensor | None = None,
    teacher_kind: str = "kl",
    teacher_mix: float = 0.0,
) -> CrossEntropy:
    """Weighted cross-entropy with extras; see ``dflash_ext.masked_cross_entropy``.

    A target outside the vocabulary makes its row NaN on every device.
    """
    target = target.long()
    weight = weight_of(target, weight, ignore_index)
    keep = weight != 0
    outside = (target < 0) | (target >= logits.shape[-1])
    z = widened(logits).masked_fill(~keep[..., None], 0.0)
    z = softcapped(z, softcap)
    logp = torch.log_softmax(z, dim=-1)
    nll = -logp.gather(-1, target.masked_fill(outside, 0)[..., None])[..., 0]
    nll = nll * torch.where(outside & keep, math.nan, 1.0)

    row = nll
    if label_smoothing:
        row = (1 - label_smoothing) * nll - label_smoothing * logp.mean(-1)
    if teacher is not None:
        row = (1 - teacher_mix) * row + teacher_mix * _divergence(teacher.detach(), logp, keep, teacher_kind)
    if z_loss:
        row = row + z_loss * torch.logsumexp(z, dim=-1).square()

    weight = weight.to(z.dtype)
    row = torch.where(keep, weight * row, 0.0)
    if reduction == "mean":
        normaliser = weight.sum() if normaliser is None else torch.as_tensor(normaliser, device=row.device).to(z.dtype)
        loss = row.sum() / torch.where(normaliser == 0, 1.0, normaliser).reshape(())
    elif reduction == "sum":
        loss = row.sum()
    elif reduction == "none":
        loss = row
    else:
        raise ValueError(f"reduction is {reduction!r}; 'mean', 'sum' and 'none' are supported")
    entropy = entropy_of(logp.detach()).masked_fill(~keep, 0.0)
    correct = (z.argmax(-1) == target) & keep
    return CrossEntropy(loss, nll.detach().masked_fill(~keep, 0.0), correct, entropy)


def weight_of(target: Tensor, weight: Tensor | None, ignore_index: int | None) -> Tensor:
    """The rows' weights, 0 where the target is ``ignore_index``."""
    weight = torch.ones(target.shape, device=target.device) if weight is None else weight
    return weight if ignore_index is None else weight.masked_fill(target.long() == ignore_index, 0)


def _divergence(teacher: Tensor, logp: Tensor, keep: Tensor, kind: str) -> Tensor:
    """KL(teacher || student) or total variation, per row."""
    log_t = torch.log_softmax(widened(teacher).masked_fill(~keep[..., None], 0.0), dim=-1)
    t = log_t.exp()
    if kind == "kl":
        return torch.where(t > 0, t * (log_t - logp), 0.0).sum(-1)
    if kind == "tv":
        return 0.5 * (t - logp.exp()).abs().sum(-1)
    raise ValueError(f"teacher_kind is {kind!r}; 'kl' and 'tv' are supported")
