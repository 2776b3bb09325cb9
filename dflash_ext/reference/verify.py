"""Speculative sampling in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import without_nan
from .penalties import counts_before, of_rows, penalised_logits
from .sampling import filter_logits, inverse_cdf, plain_logits, plain_temperature


class Verification(NamedTuple):
    """The result of verifying a draft.

    Attributes:
        accepted: int64 ``[B]``, the number of drafted tokens that are kept.
        next_token: int64 ``[B]``, the target's token after them: the bonus token. After a rejection it is drawn from
            the residual.
    """

    accepted: Tensor
    next_token: Tensor


def verify(
    draft_tokens: Tensor,
    target_logits: Tensor,
    *,
    draft_logits: Tensor | None = None,
    draft_pivot: Tensor | None = None,
    draft_normaliser: Tensor | None = None,
    uniforms: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    draft_lens: Tensor | None = None,
    **penalties: float | Tensor | None,
) -> Verification:
    """Speculative sampling (arXiv 2211.17192, 2302.01318); see ``dflash_ext.verify`` for shapes and rules.

    A draft token outside the vocabulary is rejected: no distribution has it. penalties: the arguments of
    ``penalised_logits``, of the target's logits.
    """
    batch, drafted = draft_tokens.shape
    if penalties:
        target_logits = _penalised(draft_tokens, target_logits, **penalties)
    device = draft_tokens.device
    drafted_lens = torch.full((batch,), drafted, device=device) if draft_lens is None else draft_lens.clamp(0, drafted)
    real = torch.arange(drafted, device=device) < drafted_lens[:, None]
    known = (draft_tokens >= 0) & (draft_tokens < target_logits.shape[-1])
    best = without_nan(target_logits).argmax(-1)
    if not isinstance(temperature, Tensor) and temperature == 0:
        accepted = ((draft_tokens == best[:, :drafted]) & real).cumprod(-1).sum(-1)
        return Verification(accepted, best.gather(-1, accepted[:, None])[:, 0])
    if uniforms is None:
        raise ValueError("verify: temperature > 0 needs random numbers, and none were given")

    temperature = plain_temperature(temperature, target_logits)  # [B, 1] or [1, 1]
    greedy = (temperature == 0)[..., None]
    draft_tokens = draft_tokens.masked_fill(~known, 0)
    filters = (temperature.flatten().expand(batch), top_k, top_p, min_p)
    # A row of nothing but NaN and -inf has an argmax, but no softmax.
    certain = torch.nn.functional.one_hot(best, target_logits.shape[-1])
    p = torch.where(greedy, certain, _filtered_probs(target_logits, *filters))
    point = torch.nn.functional.one_hot(draft_tokens, p.shape[-1]).to(p.dtype) * known[..., None]
    if draft_logits is None:
        q = point
    elif draft_pivot is None:
        q = _filtered_probs(draft_logits, *filters)
    else:
        z = plain_logits(draft_logits) / torch.where(greedy, 1.0, temperature[..., None])
        q = torch.where(z >= draft_pivot[..., None], (z - draft_normaliser[..., None]).exp(), 0.0)
        q = torch.where(draft_pivot[..., None] == math.inf, point, q)
    # At temperature 0 all of p is at the argmax, so a point-mass draft makes these rules the greedy ones.
    q = torch.where(greedy, point, q)

    picked = draft_tokens[..., None]
    p_token = p[:, :drafted].gather(-1, picked)[..., 0]
    q_token = q.gather(-1, picked)[..., 0]
    # A token that cannot have been drawn from q (for example, if the draft's logits are NaN) is rejected.
    passed = (uniforms[:, :drafted] * q_token < p_token) & (q_token > 0) & real & known
    accepted = passed.cumprod(-1).sum(-1)

    row = torch.arange(batch, device=device)
    wanted = p[row, accepted]
    if drafted:
        residual = (wanted - q[row, accepted.clamp(max=drafted - 1)]).clamp(min=0)
        # If p = q, the rejection came from rounding, and the residual is empty. Then p itself is drawn from.
        rejected = (accepted < drafted_lens) & (residual.sum(-1) > 0)
        wanted = torch.where(rejected[:, None], residual, wanted)
    return Verification(accepted, inverse_cdf(wanted, uniforms[:, drafted]))


def _filtered_probs(logits: Tensor, *filters: float | Tensor | None) -> Tensor:
    """The probabilities of ``logits [B, K, V]`` under filters, which are numbers or tensors [] or [B]."""
    count = logits.shape[1]
    filters = (f.repeat_interleave(count) if isinstance(f, Tensor) and f.dim() else f for f in filters)
    return torch.softmax(filter_logits(logits.flatten(0, 1), *filters), dim=-1).view(logits.shape)


def _penalised(
    drafts: Tensor, logits: Tensor, token_counts: Tensor | None = None, table_rows: Tensor | None = None, **others
) -> Tensor:
    """The target's logits ``[B, K + 1, V]``, where slot k has the committed tokens and the drafts before k."""
    count = logits.shape[1]
    others = {
        n: x.repeat_interleave(count) if n != "logit_bias" and isinstance(x, Tensor) and x.dim() else x
        for n, x in others.items()
    }
    bias = others.pop("logit_bias", None)
    if bias is not None and bias.dim() == 2:
        bias = of_rows(bias, table_rows).repeat_interleave(count, 0)
    if token_counts is not None:
        token_counts = counts_before(of_rows(token_counts, table_rows), drafts).flatten(0, 1)
    x = penalised_logits(logits.flatten(0, 1), token_counts=token_counts, logit_bias=bias, **others)
    return x.view(logits.shape)
