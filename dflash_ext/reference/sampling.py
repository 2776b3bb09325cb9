"""Filters and draws in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import entropy_of, per_row, widened, without_nan
from .penalties import penalised_logits


def filter_logits(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> Tensor:
    """Logits ``[N, V]`` divided by the temperature, with -inf for tokens that a filter drops.

    The steps in their order, each on the result of the one before:
      temperature  z = logits / T; T = 0 keeps the argmax alone (the lowest index among equals), at scale 1.
      top-k        keeps z >= the k-th largest z; None, k < 1 and k >= V keep all; a fraction is rounded down.
      top-p        keeps a token iff the tokens that are more probable than it have a mass below p; None and
                   p >= 1 keep all.
      min-p        keeps p(x) >= min_p * max p; None and min_p <= 0 keep all; more than 1 counts as 1.
    Tokens of equal logits are kept or dropped together, so that the kept tokens are those whose z is at least a pivot.
    The most probable token is always kept. Each parameter is a number, or a tensor of no dimensions or ``[N]``.

    The values of tensors are not checked, so every value has a meaning: a filter of NaN keeps all, a temperature that
    is NaN or below 1e-30 counts as 0, and one above 1e30 as 1e30. A logit of NaN counts as -inf. A row with a logit of
    +inf is a point mass at the first such token: 0 there and -inf elsewhere.
    """
    temperature = plain_temperature(temperature, logits)
    greedy = temperature == 0
    z = plain_logits(logits) / torch.where(greedy, 1.0, temperature)
    top_k, top_p, min_p = (per_row(x, logits) for x in (top_k, top_p, min_p))
    if top_k is not None or top_p is not None:
        ordered = z.sort(dim=-1, descending=True).values
    if top_k is not None:
        vocab = z.shape[-1]
        last = torch.where(top_k >= 1, top_k.clamp(max=vocab), vocab).long() - 1
        pivot = ordered.gather(-1, last.expand(z.shape[0], 1))
        z = z.masked_fill(z < pivot, -math.inf)
        ordered = ordered.masked_fill(ordered < pivot, -math.inf)
    if top_p is not None:
        probs = torch.softmax(ordered, dim=-1)
        mass_above = probs.cumsum(-1) - probs
        last = ((mass_above < top_p) | ~(top_p < 1)).sum(-1, keepdim=True).clamp(min=1) - 1
        z = z.masked_fill(z < ordered.gather(-1, last), -math.inf)
    if min_p is not None:
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + min_p.nan_to_num(0.0).clamp(0.0, 1.0).log(), -math.inf)
    token = torch.arange(z.shape[-1], device=z.device)
    return z.masked_fill(greedy & (token != z.argmax(-1, keepdim=True)), -math.inf)


def plain_temperature(temperature: float | Tensor, logits: Tensor) -> Tensor:
    """The temperature as ``per_row`` returns it: 0, or a number by which float32 can divide (see ``filter_logits``)."""
    temperature = per_row(temperature, logits)
    return torch.where(temperature >= 1e-30, temperature.clamp(max=1e30), 0.0)


def plain_logits(logits: Tensor) -> Tensor:
    """Widened ``logits [..., V]`` without NaN and +inf: see ``filter_logits``."""
    z = widened(without_nan(logits))
    best = z.argmax(-1, keepdim=True)
    certain = z.gather(-1, best) == math.inf
    point_mass = torch.full_like(z, -math.inf).scatter(-1, best, 0.0)
    return torch.where(certain, point_mass, z)


class Sample(NamedTuple):
    """One draw per row of ``[..., V]`` logits. Every field is ``[...]``; reals have the logits' widened dtype.

    Attributes:
        token: int64.
        prob, logprob: those of the token.
        entropy, margin, argmax, max_prob: of the distribution; the entropy is in nats, the margin is p1 - p2, and
            argmax is int64.
        pivot, normaliser: the filtered distribution is ``q(x) = exp(z_x - normaliser)`` for tokens with
            ``z_x >= pivot``, and 0 for others, where z is logits / temperature. A pivot of +inf marks a row with a
            logit of +inf, which is a point mass at its token.

    All but pivot and normaliser are after temperature and before the filters, and at temperature 1 for rows of
    temperature 0.
    """

    token: Tensor
    prob: Tensor
    logprob: Tensor
    entropy: Tensor
    margin: Tensor
    argmax: Tensor
    max_prob: Tensor
    pivot: Tensor
    normaliser: Tensor


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    return_filtered_entropy: bool = False,
    return_confidence: bool = False,
    **penalties: float | Tensor | None,
) -> Sample | tuple[Sample, Tensor] | tuple[Sample, Tensor, Tensor]:
    """Draws one token per row by inverse CDF in vocabulary order, from one number of [0, 1) per row.

    logits: ``[N, V]``. uniform: ``[N]``, any floating dtype. The filters are those of ``filter_logits``.
    return_filtered_entropy also returns the entropy of the filtered distribution, ``[N]``. return_confidence also
    returns the token's probability at temperature 1 and before the filters, ``[N]``. penalties: the arguments of
    ``penalised_logits``.
    """
    if penalties:
        logits = penalised_logits(logits, **penalties)
    filtered = filter_logits(logits, temperature, top_k, top_p, min_p)
    token = inverse_cdf(torch.softmax(filtered, dim=-1), uniform)

    temperature = plain_temperature(temperature, logits)
    z = plain_logits(logits) / torch.where(temperature == 0, 1.0, temperature)
    logp = torch.log_softmax(z, dim=-1)
    probs = logp.exp()
    logprob = logp.gather(-1, token[:, None])[:, 0]
    top = probs.topk(min(2, probs.shape[-1]), dim=-1).values
    certain = (logits == math.inf).any(-1)
    drawn = Sample(
        token=token,
        prob=logprob.exp(),
        logprob=logprob,
        entropy=entropy_of(logp),
        margin=top[:, 0] - top[:, 1] if top.shape[-1] > 1 else top[:, 0],
        argmax=logp.argmax(-1),
        max_prob=top[:, 0],
        pivot=torch.where(filtered > -math.inf, filtered, math.inf).amin(-1).masked_fill(certain, math.inf),
        normaliser=torch.logsumexp(filtered, dim=-1),
    )
    more = []
    if return_filtered_entropy:
        more.append(entropy_of(torch.log_softmax(filtered, dim=-1)))
    if return_confidence:
        more.append(torch.softmax(plain_logits(logits), dim=-1).gather(-1, token[:, None])[:, 0])
    return (drawn, *more) if more else drawn


def inverse_cdf(mass: Tensor, uniform: Tensor) -> Tensor:
    """The index (int64 [N]) where the running sum of ``mass [N, V]`` first passes ``uniform [N]`` times its total."""
    cdf = mass.double().cumsum(-1)
    total = cdf[:, -1:]
    passed = (cdf > uniform.double()[:, None] * total) | (cdf == total)
    return (passed & (mass > 0)).to(torch.uint8).argmax(-1)
