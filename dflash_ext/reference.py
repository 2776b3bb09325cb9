"""Every operator in plain PyTorch, written to be read: what kernels are tested against.

Any floating dtype; the arithmetic is in float32, or in float64 for float64 inputs. Speed is no aim here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .masks import IntervalMask

# ---- attention -------------------------------------------------------------------------------------------


def block_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under an IntervalMask; see ``dflash_ext.block_attn`` for shapes."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = mask.to_bool()
    empty = ~visible.any(-1, keepdim=True)
    with torch.autocast(q.device.type, enabled=False):
        # All query heads of one key head are rows of the same product.
        grouped = _widened(q).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
        scores = (grouped @ _widened(k).mT * scale).unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # An empty row is computed from zeros and then overwritten, which keeps NaN out of its gradients.
        scores = scores.masked_fill(~visible, -math.inf).masked_fill(empty, 0.0)
        probs = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
        # 0 * NaN is NaN: a value that is not finite reaches the rows that see it, and no other.
        values = _widened(v)
        broken = ~values.isfinite()
        reached = visible.to(values.dtype) @ broken.to(values.dtype) > 0
        out = probs.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ values.masked_fill(broken, 0.0)
    out = out.unflatten(2, (heads // kv_heads, -1)).masked_fill(reached.unsqueeze(2), math.nan)
    out = out.flatten(1, 2).to(q.dtype)
    if not return_lse:
        return out
    return out, torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -math.inf)


def block_attn_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: IntervalMask,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention against a cache; see ``dflash_ext.block_attn_decode`` for shapes."""
    caches = []
    for cache in (k_cache, v_cache):
        if block_table is not None:
            pages = cache[block_table.clamp(min=0).long()]  # [B, max_pages, page_size, Hkv, D]
            cache = pages.flatten(1, 2).transpose(1, 2)
        caches.append(cache[:, :, : mask.kv_len])
    return block_attn(q, *caches, mask, scale=scale, softcap=softcap)


# ---- loss ------------------------------------------------------------------------------------------------


class CrossEntropy(NamedTuple):
    """loss: scalar, or per row with reduction "none"; the only field that carries a gradient.
    nll, entropy: float32 (float64 for float64 logits), per row. correct: bool, per row: argmax is the target.
    All three are 0 for rows of weight 0.
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
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Tensor | None = None,
    teacher_kind: str = "kl",
    teacher_mix: float = 0.0,
) -> CrossEntropy:
    """Weighted cross entropy with extras; see ``dflash_ext.masked_cross_entropy``."""
    weight = torch.ones(target.shape, device=target.device) if weight is None else weight
    keep = weight != 0
    z = _widened(logits).masked_fill(~keep[..., None], 0.0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z, dim=-1)
    nll = -logp.gather(-1, target.masked_fill(~keep, 0)[..., None])[..., 0]

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
        total = weight.sum()
        loss = row.sum() / torch.where(total == 0, 1.0, total)
    elif reduction == "sum":
        loss = row.sum()
    elif reduction == "none":
        loss = row
    else:
        raise ValueError(f"reduction is {reduction!r}; 'mean', 'sum' and 'none' are supported")
    entropy = _entropy(logp.detach()).masked_fill(~keep, 0.0)
    correct = (z.argmax(-1) == target) & keep
    return CrossEntropy(loss, nll.detach().masked_fill(~keep, 0.0), correct, entropy)


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    max_rows: int | None = None,
    **options,
) -> CrossEntropy:
    """``masked_cross_entropy`` of ``hidden @ head.T``; see ``dflash_ext.linear_cross_entropy``."""
    kept = target.numel() if weight is None else int((weight != 0).sum())
    if max_rows is not None and kept > max_rows:
        raise ValueError(f"linear_cross_entropy: {kept} rows have a weight, more than max_rows = {max_rows}")
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _widened(hidden) @ _widened(head).T
    return masked_cross_entropy(logits, target, weight, **options)


def _divergence(teacher: Tensor, logp: Tensor, keep: Tensor, kind: str) -> Tensor:
    """KL(teacher || student) or total variation, per row."""
    log_t = torch.log_softmax(_widened(teacher).masked_fill(~keep[..., None], 0.0), dim=-1)
    t = log_t.exp()
    if kind == "kl":
        return torch.where(t > 0, t * (log_t - logp), 0.0).sum(-1)
    if kind == "tv":
        return 0.5 * (t - logp.exp()).abs().sum(-1)
    raise ValueError(f"teacher_kind is {kind!r}; 'kl' and 'tv' are supported")


# ---- sampling --------------------------------------------------------------------------------------------


def filter_logits(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> Tensor:
    """Logits ``[N, V]`` over temperature, with -inf where a filter drops the token.

    In this order, each over what the one before left:
      temperature  z = logits / T; T = 0 keeps the argmax alone (the lowest index among equals), at scale 1.
      top-k        keeps z >= the k-th largest z; None, 0 and k >= V keep all.
      top-p        keeps a token iff the tokens that are more probable than it have a mass below p; None and
                   p >= 1 keep all.
      min-p        keeps p(x) >= min_p * max p; None and 0 keep all.
    Tokens of equal logits share one fate, so that what is kept is what reaches a pivot; the most probable
    token is always kept. Each parameter is a number or a tensor ``[N]``. NaN counts as -inf.
    """
    temperature, top_k, top_p, min_p = (_per_row(x, logits) for x in (temperature, top_k, top_p, min_p))
    greedy = temperature == 0
    z = _widened(_without_nan(logits)) / torch.where(greedy, 1.0, temperature)
    if top_k is not None or top_p is not None:
        ordered = z.sort(dim=-1, descending=True).values
    if top_k is not None:
        vocab = z.shape[-1]
        last = torch.where(top_k <= 0, vocab, top_k.clamp(max=vocab)).long() - 1
        pivot = ordered.gather(-1, last.expand(z.shape[0], 1))
        z = z.masked_fill(z < pivot, -math.inf)
        ordered = ordered.masked_fill(ordered < pivot, -math.inf)
    if top_p is not None:
        probs = torch.softmax(ordered, dim=-1)
        mass_above = probs.cumsum(-1) - probs
        last = ((mass_above < top_p) | (top_p >= 1)).sum(-1, keepdim=True).clamp(min=1) - 1
        z = z.masked_fill(z < ordered.gather(-1, last), -math.inf)
    if min_p is not None:
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + min_p.log(), -math.inf)
    token = torch.arange(z.shape[-1], device=z.device)
    return z.masked_fill(greedy & (token != z.argmax(-1, keepdim=True)), -math.inf)


class Sample(NamedTuple):
    """One draw per row of ``[N, V]`` logits; every field is ``[N]``, the real ones in the logits' widened
    dtype.

    token: int64. prob, logprob: the token's; entropy (nats), margin (p1 - p2), max_prob, argmax (int64): the
    distribution's. All these are after temperature and before the filters, at temperature 1 where it is 0.
    pivot, normaliser: the filtered distribution is ``q(x) = exp(z_x - normaliser)`` for every ``z_x >=
    pivot`` and 0 elsewhere, z being the logits over temperature.
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
) -> Sample | tuple[Sample, Tensor]:
    """Draws one token per row by inverse CDF in vocabulary order, from one number of [0, 1) per row.

    logits: ``[N, V]``. uniform: ``[N]``, any floating dtype. The filters are those of ``filter_logits``.
    With return_filtered_entropy also the entropy of the filtered distribution, ``[N]``.
    """
    filtered = filter_logits(logits, temperature, top_k, top_p, min_p)
    token = _inverse_cdf(torch.softmax(filtered, dim=-1), uniform)

    temperature = _per_row(temperature, logits)
    z = _widened(_without_nan(logits)) / torch.where(temperature == 0, 1.0, temperature)
    logp = torch.log_softmax(z, dim=-1)
    probs = logp.exp()
    logprob = logp.gather(-1, token[:, None])[:, 0]
    top = probs.topk(min(2, probs.shape[-1]), dim=-1).values
    drawn = Sample(
        token=token,
        prob=logprob.exp(),
        logprob=logprob,
        entropy=_entropy(logp),
        margin=top[:, 0] - top[:, 1] if top.shape[-1] > 1 else top[:, 0],
        argmax=logp.argmax(-1),
        max_prob=top[:, 0],
        pivot=torch.where(filtered > -math.inf, filtered, math.inf).amin(-1),
        normaliser=torch.logsumexp(filtered, dim=-1),
    )
    if not return_filtered_entropy:
        return drawn
    return drawn, _entropy(torch.log_softmax(filtered, dim=-1))


class Verification(NamedTuple):
    """accepted: int64 ``[B]``, how many drafted tokens are kept. next_token: int64 ``[B]``, the target's
    token after
    them: the correction of the first rejected one, or the bonus."""

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
) -> Verification:
    """Speculative sampling (arXiv 2211.17192, 2302.01318); see ``dflash_ext.verify`` for shapes and rules."""
    batch, drafted = draft_tokens.shape
    device = draft_tokens.device
    drafted_lens = torch.full((batch,), drafted, device=device) if draft_lens is None else draft_lens.clamp(0, drafted)
    real = torch.arange(drafted, device=device) < drafted_lens[:, None]
    if not isinstance(temperature, Tensor) and temperature == 0:
        best = _without_nan(target_logits).argmax(-1)
        accepted = ((draft_tokens == best[:, :drafted]) & real).cumprod(-1).sum(-1)
        return Verification(accepted, best.gather(-1, accepted[:, None])[:, 0])
    if uniforms is None:
        raise ValueError("verify: temperature > 0 needs random numbers, and none were given")

    temperature = _per_row(temperature, target_logits).flatten().expand(batch)
    greedy = temperature == 0
    draft_tokens = draft_tokens.masked_fill(~real, 0)
    filters = (temperature, top_k, top_p, min_p)
    p = _filtered_probs(target_logits, *filters)
    point = torch.nn.functional.one_hot(draft_tokens, p.shape[-1]).to(p.dtype)
    if draft_logits is None:
        q = point
    elif draft_pivot is None:
        q = _filtered_probs(draft_logits, *filters)
    else:
        z = _widened(draft_logits) / torch.where(greedy, 1.0, temperature)[:, None, None]
        q = torch.where(z >= draft_pivot[..., None], (z - draft_normaliser[..., None]).exp(), 0.0)
    # At temperature 0 all of p is at the argmax, so a point-mass draft makes these rules the greedy ones.
    q = torch.where(greedy[:, None, None], point, q)

    picked = draft_tokens[..., None]
    p_token = p[:, :drafted].gather(-1, picked)[..., 0]
    q_token = q.gather(-1, picked)[..., 0]
    # A token that q could not have drawn (the draft's logits are NaN, say) is no draft: p decides alone.
    passed = (uniforms[:, :drafted] * q_token < p_token) & (q_token > 0) & real
    accepted = passed.cumprod(-1).sum(-1)

    row = torch.arange(batch, device=device)
    wanted = p[row, accepted]
    if drafted:
        residual = (wanted - q[row, accepted.clamp(max=drafted - 1)]).clamp(min=0)
        # Where p = q the residual is nothing but rounding, and so was the rejection.
        rejected = (accepted < drafted_lens) & (residual.sum(-1) > 0)
        wanted = torch.where(rejected[:, None], residual, wanted)
    return Verification(accepted, _inverse_cdf(wanted, uniforms[:, drafted]))


def _filtered_probs(logits: Tensor, *filters: float | Tensor | None) -> Tensor:
    """Of ``logits [B, K, V]``, under filters that are numbers or tensors [B]."""
    batch, count, vocab = logits.shape
    filters = (f.repeat_interleave(count) if isinstance(f, Tensor) else f for f in filters)
    return torch.softmax(filter_logits(logits.reshape(-1, vocab), *filters), dim=-1).view(logits.shape)


def _inverse_cdf(mass: Tensor, uniform: Tensor) -> Tensor:
    """int64 [N]: where the running sum of ``mass [N, V]`` first passes ``uniform [N]`` times its total."""
    cdf = mass.double().cumsum(-1)
    total = cdf[:, -1:]
    passed = (cdf > uniform.double()[:, None] * total) | (cdf == total)
    return (passed & (mass > 0)).to(torch.uint8).argmax(-1)


# ---- revealing a canvas ----------------------------------------------------------------------------------


def reveal(
    scores: Tensor | None,
    masked: Tensor,
    *,
    count: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """Which masked positions of a canvas to commit; see ``dflash_ext.reveal`` for the rules."""
    rule, limit = reveal_limit(
        scores, entropy, count=count, threshold=threshold, factor=factor, entropy_bound=entropy_bound
    )
    if scores is None:
        scores = torch.zeros(masked.shape, device=masked.device)
    limit = _per_row(limit, masked)

    # Every rule takes a prefix of the masked positions in falling order of score.
    scores = _without_nan(_widened(scores))
    ranked = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~masked, -math.inf)
    confidence, order = ranked.sort(dim=-1, descending=True, stable=True)
    nth = torch.arange(1, masked.shape[-1] + 1, device=masked.device)
    if rule == "count":
        taken = nth <= limit
    elif rule == "threshold":
        taken = (confidence > limit) | (nth == 1)
    elif rule == "factor":
        taken = (confidence >= 1 - limit / (nth + 1)).cumprod(-1).bool() | (nth == 1)
    else:
        h = _widened(entropy).masked_fill(~masked, 0.0).gather(-1, order)
        taken = (h.cumsum(-1) - h.cummax(-1).values <= limit) | (nth == 1)
    return torch.zeros_like(masked).scatter(-1, order, taken.expand_as(masked)) & masked


def reveal_limit(
    scores: Tensor | None, entropy: Tensor | None, **limits: float | Tensor | None
) -> tuple[str, float | Tensor]:
    """The one limit of ``reveal`` that is given, by name. Raises ValueError unless it is one, with its needs."""
    given = [name for name, limit in limits.items() if limit is not None]
    if len(given) != 1:
        raise ValueError(
            f"reveal: {', '.join(given) or 'no limit'} given; exactly one of {', '.join(limits)} is needed"
        )
    rule = given[0]
    if rule == "entropy_bound" and entropy is None:
        raise ValueError("reveal: entropy_bound needs entropy")
    if rule in ("threshold", "factor") and scores is None:
        raise ValueError(f"reveal: {rule} needs scores, the confidence of each position")
    return rule, limits[rule]


def reveal_count(total: Tensor, step: int, steps: int, *, schedule: str = "linear") -> Tensor:
    """How many positions to commit in one step; see ``dflash_ext.reveal_count``."""
    if not 0 <= step < steps:
        raise ValueError(f"reveal_count: step is {step}; 0 to {steps - 1} are the steps")
    if schedule == "linear":
        return total // steps + (step < total % steps).to(total.dtype)
    if schedule == "cosine":
        before, after = ((total * math.cos(math.pi * s / (2 * steps))).floor() for s in (step, step + 1))
        return (before - after).to(total.dtype)
    raise ValueError(f"reveal_count: schedule is {schedule!r}; 'linear' and 'cosine' are supported")


# ---- injecting context into a cache ----------------------------------------------------------------------


def kv_inject(
    features: Tensor,
    weight: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bias: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_plus_one: bool = False,
    norm_after_rope: bool = False,
    v_norm: bool = False,
    rope_interleaved: bool = False,
    slots: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Context features to the keys and values of every layer, in place; see ``dflash_ext.kv_inject``."""
    layers = len(k_caches)
    kv_heads, head_dim = k_caches[0].shape[1 if block_table is None else 2], k_caches[0].shape[-1]
    slots = positions if slots is None else slots
    with torch.autocast(features.device.type, enabled=False):
        projected = _widened(features) @ _widened(weight).T
    if bias is not None:
        projected = projected + bias
    projected = projected.unflatten(-1, (layers, 2, kv_heads, head_dim))  # [B, S, L, 2, Hkv, D]
    b, s = (slots >= 0).nonzero(as_tuple=True)
    slot = slots[b, s].long()
    for layer in range(layers):
        k, v = projected[b, s, layer].unbind(1)  # [T, Hkv, D], T tokens
        gain = None
        if k_norm is not None:
            gain = k_norm[layer] + 1 if norm_plus_one else k_norm[layer]
        if gain is not None and not norm_after_rope:
            k = _rms_norm(k, norm_eps) * gain
        table = (cos, sin) if cos.dim() == 2 else (cos[layer], sin[layer])
        k = _rope(k, *(t[positions[b, s].long()][:, None] for t in table), rope_interleaved)
        if gain is not None and norm_after_rope:
            k = _rms_norm(k, norm_eps) * gain
        if v_norm:
            v = _rms_norm(v, norm_eps)
        for cache, new in ((k_caches[layer], k), (v_caches[layer], v)):
            if block_table is None:
                cache[b, :, slot] = new.to(cache.dtype)
            else:
                page_size = cache.shape[1]
                cache[block_table[b, slot // page_size].long(), slot % page_size] = new.to(cache.dtype)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first 2 * R of the last dimension, R being the angles of cos and sin [..., R]."""
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


# ---- shared ----------------------------------------------------------------------------------------------


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_nan(x: Tensor) -> Tensor:
    """With -inf in the place of NaN."""
    return x.masked_fill(x.isnan(), -math.inf)


def _entropy(logp: Tensor) -> Tensor:
    """In nats, of log-probabilities over the last dimension, of which some may be -inf."""
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def _per_row(value: float | Tensor | None, rows: Tensor) -> Tensor | None:
    """A number, or one number per row, as something that broadcasts against ``rows [N, V]``."""
    if value is None:
        return None
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.to(dtype)[:, None]
    return torch.full((1, 1), value, dtype=dtype, device=rows.device)
