"""Drawing tokens, verifying drafts, and choosing which positions of a canvas to commit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..arguments import check_one_device, checked
from ..library import load
from ..reference import Sample, Verification
from .serving import warn_once

load()
_native = torch.ops.dflash_ext

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The native operators know the rules of reveal by their places here.
_RULES = ("count", "threshold", "factor", "entropy_bound")
# Given one seed, the operators draw from different streams: a draft and its verification must be independent.
_SAMPLE, _VERIFY = 1, 2


@checked
def sample(
    logits: Tensor,
    seed: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    return_filtered_entropy: bool = False,
) -> Sample | tuple[Sample, Tensor]:
    """Draws one token per row of ``logits [N, V]``, and measures the distribution it came from; no gradient.

    Args:
        logits: float32, bfloat16, float16 or float64, the last dimension contiguous; read once, without filters.
        seed: int64 ``[1]``, from which every row takes its own random number by its index; or ``[N]``, one
            per row, so that a draw does not depend on where in the batch its row stands. The same seed gives
            the same tokens. It is read on the device, so a captured graph draws anew once the seed tensor is
            updated.
        temperature: 0 takes the argmax (the lowest index among equals).
        top_k, top_p, min_p: filters, applied in this order after temperature. top_k None or 0, top_p None or
            >= 1, and min_p None or 0 are off. Tokens of equal logits are kept or dropped together, and the
            most probable token is always kept.
        return_filtered_entropy: also the entropy of the distribution after the filters, ``[N]``.

    temperature and the filters are numbers or tensors ``[N]``. A logit that is NaN counts as -inf, so that it is never
    drawn; a row of nothing else gives token 0, whose ``prob`` is NaN, as are the measures.

    Returns:
        Sample, each field ``[N]``; its reals are float32 (float64 for float64 logits). ``token`` (int64) with
        ``prob`` and ``logprob``; ``entropy`` in nats, ``margin`` (p1 - p2), ``argmax`` and ``max_prob``, all
        of the distribution after temperature and before the filters (of temperature 1 where it is 0);
        ``pivot`` and ``normaliser``, the filtered distribution in the form that ``verify`` takes:
        ``exp(z - normaliser)`` where ``z >= pivot``, else 0, for z = logits / temperature; a pivot may be -inf.

    Raises ValueError for arguments that do not fit together, TypeError for one that is no tensor or number.
    """
    if logits.dim() != 2 or logits.dtype not in _DTYPES or logits.shape[1] == 0:
        raise ValueError(f"sample: logits is {logits.dtype} {list(logits.shape)}; floating [N, V] is needed")
    rows = logits.shape[0]
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_one_device("sample", logits=logits, seed=seed, **filters)
    _check_last_dim("sample", "logits", logits)
    _check_seed("sample", seed, rows)
    _check_numbers("sample", rows, **filters)
    logits = logits.detach()
    if not logits.is_cuda:
        ids, reals = _native.sample(logits, seed.contiguous(), *_filters(logits, **filters))
        token, argmax = ids.unbind()
        prob, logprob, entropy, margin, max_prob, pivot, normaliser, filtered_entropy = reals.unbind()
        drawn = Sample(token, prob, logprob, entropy, margin, argmax, max_prob, pivot, normaliser)
        return (drawn, filtered_entropy) if return_filtered_entropy else drawn
    warn_once("sample", logits.device)
    return reference.sample(
        logits,
        _uniforms(seed, _SAMPLE, rows, 1)[:, 0],
        **filters,
        return_filtered_entropy=return_filtered_entropy,
    )


@checked
def verify(
    draft_tokens: Tensor,
    target_logits: Tensor,
    *,
    draft_logits: Tensor | None = None,
    draft_pivot: Tensor | None = None,
    draft_normaliser: Tensor | None = None,
    seed: Tensor | None = None,
    uniforms: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    draft_lens: Tensor | None = None,
) -> Verification:
    """The longest prefix of a draft that the target accepts, and the target's own token after it.

    At temperature 0 a token is accepted while it is the target's argmax, and the next token is the target's
    argmax. Above 0 token x is accepted with probability min(1, p(x) / q(x)); the token after the first
    rejection is drawn from max(p - q, 0), normalised, and the bonus token after a draft that was accepted
    whole from p. So the output is distributed as the target's own (arXiv 2211.17192, 2302.01318). p and q are
    both under the temperature and the filters of ``sample``, and NaN counts as -inf there too.

    Args:
        draft_tokens: int64 ``[B, K]``.
        target_logits: ``[B, K + 1, V]``; entry k is the target's prediction of draft token k, the last of the
            bonus. dtypes as in ``sample``. On the CPU nothing after the first rejected token is read.
        draft_logits: ``[B, K, V]``, those that the draft was drawn from. None for a draft that was not
            sampled, or not left to right: a point mass, accepted with p(x), whose residual is p without x.
        draft_pivot, draft_normaliser: ``[B, K]`` from the draft's ``Sample``, so that q is the one drawn
            from; without them q is filtered again.
        seed: int64 ``[1]`` or ``[B]`` on the device, as in ``sample``; the same seed may serve both.
        uniforms: ``[B, K + 1]`` in [0, 1) in place of a seed: one per acceptance, the last for the draw.
        temperature, top_k, top_p, min_p: numbers or tensors ``[B]``; rows of temperature 0 and above may mix.
        draft_lens: int ``[B]``, how many tokens of a row were drafted; the rest are ignored. K unless given.

    Returns:
        Verification of ``accepted`` int64 ``[B]`` (0 to draft_lens) and ``next_token`` int64 ``[B]``.

    Raises ValueError for arguments that do not fit together, TypeError for one that is no tensor or number, and on the
    CPU RuntimeError for a draft token outside the vocabulary.
    """
    if draft_tokens.dim() != 2 or draft_tokens.dtype != torch.int64:
        raise ValueError(
            f"verify: draft_tokens is {draft_tokens.dtype} {list(draft_tokens.shape)}; int64 [B, K] is needed"
        )
    batch, drafted = draft_tokens.shape
    if target_logits.dim() != 3 or target_logits.dtype not in _DTYPES or target_logits.shape[2] == 0:
        raise ValueError(
            f"verify: target_logits is {target_logits.dtype} {list(target_logits.shape)}; floating "
            f"[{batch}, {drafted + 1}, V] is needed"
        )
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_one_device(
        "verify",
        draft_tokens=draft_tokens,
        target_logits=target_logits,
        draft_logits=draft_logits,
        draft_pivot=draft_pivot,
        draft_normaliser=draft_normaliser,
        seed=seed,
        uniforms=uniforms,
        draft_lens=draft_lens,
        **filters,
    )
    vocab = target_logits.shape[2]
    for name, given, shape in (
        ("target_logits", target_logits, (batch, drafted + 1, vocab)),
        ("draft_logits", draft_logits, (batch, drafted, vocab)),
        ("draft_pivot", draft_pivot, (batch, drafted)),
        ("draft_normaliser", draft_normaliser, (batch, drafted)),
        ("uniforms", uniforms, (batch, drafted + 1)),
        ("draft_lens", draft_lens, (batch,)),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"verify: {name} is {list(given.shape)}; {list(shape)} is needed")
    if draft_lens is not None and (draft_lens.is_floating_point() or draft_lens.dtype == torch.bool):
        raise ValueError(f"verify: draft_lens is {draft_lens.dtype}; an integer dtype is needed")
    if (draft_pivot is None) != (draft_normaliser is None) or (draft_pivot is not None and draft_logits is None):
        raise ValueError("verify: draft_pivot and draft_normaliser come together, and with draft_logits")
    for name, given in (("target_logits", target_logits), ("draft_logits", draft_logits)):
        if given is not None:
            _check_last_dim("verify", name, given)
    if seed is not None and uniforms is not None:
        raise ValueError("verify: seed and uniforms are both given; one of them is needed")
    if seed is not None:
        _check_seed("verify", seed, batch)
    elif uniforms is None and (isinstance(temperature, Tensor) or temperature != 0):
        raise ValueError("verify: temperature > 0 needs random numbers, and none were given")
    _check_numbers("verify", batch, **filters)
    if not target_logits.is_cuda:
        if draft_logits is not None:
            dtype = torch.promote_types(target_logits.dtype, draft_logits.dtype)
            target_logits, draft_logits = target_logits.to(dtype), draft_logits.to(dtype)
        real = _real_dtype(target_logits)
        return Verification(
            *_native.verify(
                draft_tokens.contiguous(),
                target_logits,
                draft_logits,
                _as(draft_pivot, real),
                _as(draft_normaliser, real),
                None if seed is None else seed.contiguous(),
                _as(uniforms, torch.float64),
                _as(draft_lens, torch.int64),
                *_filters(target_logits, **filters),
            )
        )
    if seed is not None:
        uniforms = _uniforms(seed, _VERIFY, batch, drafted + 1)
    warn_once("verify", draft_tokens.device)
    return reference.verify(
        draft_tokens,
        target_logits,
        draft_logits=draft_logits,
        draft_pivot=draft_pivot,
        draft_normaliser=draft_normaliser,
        uniforms=uniforms,
        draft_lens=draft_lens,
        **filters,
    )


@checked
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
    """Which masked positions of a canvas to commit in this step of diffusion: an order and one limit.

    The masked positions are taken in falling order of score (left to right among equals), as far as the limit
    goes. Scores may be the confidence (max p), the margin (p1 - p2), -H for the order of entropy, or None for
    left to right. A score that is NaN counts as -inf, the last in the order; an entropy that is NaN exceeds any bound.

    Args:
        scores: ``[B, L]``, or None.
        masked: bool ``[B, L]``: the positions that may be committed.
        count: so many positions, or all that are left (linear and cosine schedules: ``reveal_count``).
        threshold: all of score > threshold (Fast-dLLM); scores are confidences.
        factor: the n-th while its confidence >= 1 - factor / (n + 1) (dInfer); scores are confidences.
        entropy_bound: the longest prefix whose ``sum(H) - max(H)`` is at most the bound (arXiv 2505.24857).
            In the order of -H and with every position masked this is also the acceptance rule of
            uniform-state diffusion.
        entropy: ``[B, L]``, H in nats, for entropy_bound.

    A limit is a number or a tensor ``[B]``. All but count take at least one position of a row that has any.

    Returns:
        bool ``[B, L]``, a part of masked. Raises ValueError unless exactly one limit is given, with what it
        needs.
    """
    if masked.dim() != 2 or masked.dtype != torch.bool:
        raise ValueError(f"reveal: masked is {masked.dtype} {list(masked.shape)}; bool [B, L] is needed")
    for name, given in (("scores", scores), ("entropy", entropy)):
        if given is not None and given.shape != masked.shape:
            raise ValueError(f"reveal: {name} is {list(given.shape)}; {list(masked.shape)} is needed")
    limits = {"count": count, "threshold": threshold, "factor": factor, "entropy_bound": entropy_bound}
    check_one_device("reveal", masked=masked, scores=scores, entropy=entropy, **limits)
    _check_numbers("reveal", masked.shape[0], **limits)
    rule, limit = reference.reveal_limit(scores, entropy, **limits)
    if not masked.is_cuda:
        real = torch.float32
        for given in (scores, entropy):
            real = real if given is None else torch.promote_types(real, given.dtype)
        return _native.reveal(
            _as(scores, real),
            masked.contiguous(),
            _as(entropy, real),
            _RULES.index(rule),
            *_number_and_tensor(limit, 0.0, real),
        )
    warn_once("reveal", masked.device)
    return reference.reveal(scores, masked, entropy=entropy, **{rule: limit})


@checked
def reveal_count(total: Tensor, step: int, steps: int, *, schedule: str = "linear") -> Tensor:
    """How many positions to commit in step ``step`` (from 0) of ``steps``, for ``reveal``'s count.

    total: int ``[B]``, the positions masked before the first step. schedule: "linear", equal shares, the
    remainder going to the first steps; or "cosine", after which a fraction cos(pi s / 2 steps) is still
    masked after s steps (MaskGIT, arXiv 2202.04200), rounded down. The counts of all steps add up to total.
    Returns int ``[B]``.
    Raises ValueError for a step out of range or an unknown schedule.
    """
    return reference.reveal_count(total, step, steps, schedule=schedule)


# Of numbers that are not 0. Outside them a temperature or its inverse leaves float32.
_RANGES = {"temperature": (1e-30, 1e30), "min_p": (0.0, 1.0)}


def _check_numbers(op: str, rows: int, **numbers: float | Tensor | None) -> None:
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.shape != (rows,):
            raise ValueError(f"{op}: {name} is a tensor {list(value.shape)}; a number or [{rows}] is needed")
        if isinstance(value, Tensor) or value is None:
            continue
        least, most = _RANGES.get(name, (0.0, math.inf))
        if not (value == 0 or least <= value <= most):
            raise ValueError(f"{op}: {name} is {value}; 0 or a number from {least:g} to {most:g} is needed")


def _check_seed(op: str, seed: Tensor, rows: int) -> None:
    if seed.dtype != torch.int64 or seed.shape not in ((1,), (rows,)):
        raise ValueError(f"{op}: seed is {seed.dtype} {list(seed.shape)}; int64 [1] or [{rows}] is needed")


def _check_last_dim(op: str, name: str, logits: Tensor) -> None:
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} must be contiguous, its stride is {logits.stride(-1)}")


# ---- the native operators' arguments ---------------------------------------------------------------------


def _real_dtype(logits: Tensor) -> torch.dtype:
    """The precision of sums and of everything per row."""
    return torch.promote_types(logits.dtype, torch.float32)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _number_and_tensor(value: float | Tensor | None, off: float, real: torch.dtype) -> tuple[float, Tensor | None]:
    """A parameter is a number, or a tensor of one per row in its place."""
    if isinstance(value, Tensor):
        return off, _as(value, real)
    return (off if value is None else float(value)), None


def _filters(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
) -> tuple[float | Tensor | None, ...]:
    """The four as numbers, then as tensors."""
    given = (temperature, 1.0), (top_k, 0.0), (top_p, 1.0), (min_p, 0.0)
    numbers, tensors = zip(*(_number_and_tensor(value, off, _real_dtype(logits)) for value, off in given), strict=True)
    return *numbers, *tensors


@torch.library.register_fake("dflash_ext::sample")
def _(logits, seed, *filters):
    rows = logits.shape[0]
    return (
        logits.new_empty(2, rows, dtype=torch.int64),
        logits.new_empty(8, rows, dtype=_real_dtype(logits)),
    )


@torch.library.register_fake("dflash_ext::verify")
def _(draft_tokens, *others):
    return draft_tokens.new_empty(draft_tokens.shape[0]), draft_tokens.new_empty(draft_tokens.shape[0])


@torch.library.register_fake("dflash_ext::reveal")
def _(scores, masked, *others):
    return masked.new_empty(masked.shape)


# ---- the native operators' random numbers, in PyTorch ----------------------------------------------------


def _uniforms(seed: Tensor, stream: int, rows: int, count: int) -> Tensor:
    """float64 ``[rows, count]`` in [0, 1), a function of the seed, the stream, the row and the column.

    SplitMix64's mixing function over counters, so nothing is read back and no state is kept. With one seed
    per row, every row counts as the first of its own seed.
    """
    index = torch.arange(rows, device=seed.device) if seed.shape[0] == 1 else torch.zeros_like(seed)
    key = _mix(_mix(_mix(seed + _GOLDEN) + stream) + index * _GOLDEN)
    bits = _mix(key[:, None] + torch.arange(1, count + 1, device=seed.device) * _GOLDEN)
    return _shifted(bits, 11).double() * 2.0**-53


# 2^64 over the golden ratio and SplitMix64's two multipliers, as the signed numbers that torch.int64 holds.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
