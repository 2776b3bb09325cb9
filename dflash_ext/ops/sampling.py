"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_one_device, shown
from ..native import load
from ..reference import Sample
from .backends import warn_once
from .logits import LOGITS_DTYPES, by_row, check_last_dim, filter_arguments, real_dtype
from .random import SAMPLE, seed_tensor, uniforms_of

load()
_native = torch.ops.dflash_ext


def sample(
    logits: Tensor,
    seed: int | Tensor | torch.Generator,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    return_filtered_entropy: bool = False,
    return_confidence: bool = False,
) -> Sample | tuple[Sample, Tensor] | tuple[Sample, Tensor, Tensor]:
    """Draws one token per row of ``logits [..., V]``, and measures the distribution it came from; no gradient.

    Args:
        logits: float32, bfloat16, float16 or float64, the last dimension contiguous; read once, without filters.
        seed: an int, or an int64 tensor ``[]`` or ``[1]``, from which every row takes its own random number by its
            index; an int64 tensor ``[...]``, one per row, so that a draw does not depend on where in the batch its
            row stands; or a torch.Generator, from which an int is drawn (not under torch.compile, which cannot trace
            one). The same seed gives the same tokens. A tensor is read on the device, so a captured graph draws anew
            once it is updated; an int is a constant of the graph.
        temperature: 0 takes the argmax (the lowest index among equals).
        top_k, top_p, min_p: filters, applied in this order after temperature. top_k None, 0 or -1, top_p None or
            >= 1, and min_p None or 0 are off. The most probable token is always kept.
        return_filtered_entropy: also the entropy of the distribution after the filters, ``[...]``.
        return_confidence: also the token's probability under softmax(logits), at temperature 1 and before the
            filters, ``[...]``. LLaDA and Fast-dLLM call it the confidence and reveal positions by it, whatever the
            temperature of the draw. At other temperatures than 0 and 1 it costs another read of the logits.

    temperature and the filters are numbers, or tensors of no dimensions or ``[...]``. Numbers out of range are
    refused. Nothing waits for a tensor's values, so that each has a meaning there: a filter of NaN is off, a top_k
    below 1 is off and a fraction of it is rounded down, a min_p above 1 counts as 1, a temperature that is NaN or
    below 1e-30 counts as 0, and one above 1e30 as 1e30.

    A logit that is NaN counts as -inf, so that it is never drawn; a row of nothing else gives token 0, whose ``prob``
    is NaN, as are the measures. A row with a logit of +inf, for which softmax would give NaN, is a point mass at the
    first such token: its ``prob`` is 1.

    Tokens of equal logits are kept or dropped together, because a pivot and a normaliser then describe the filtered
    distribution, and ``verify`` needs no second pass over the draft's logits. The filters of transformers sort, and
    drop some of several equal tokens by their place in the sort. Between tokens that differ both agree. With bfloat16
    logits, where ties are frequent, a top_p of 0.9 kept more tokens than theirs in 412 of 700 rows; the total
    variation between the two distributions was 0.002 on average and 0.08 at most.

    Returns:
        Sample, each field ``[...]``; its reals are float32 (float64 for float64 logits). ``token`` (int64) with
        ``prob`` and ``logprob``; ``entropy`` in nats, ``margin`` (p1 - p2), ``argmax`` and ``max_prob``, all
        of the distribution after temperature and before the filters (of temperature 1 where it is 0);
        ``pivot`` and ``normaliser``, the filtered distribution in the form that ``verify`` takes:
        ``exp(z - normaliser)`` where ``z >= pivot``, else 0, for z = logits / temperature. A pivot may be -inf; one
        of +inf marks a row with a logit of +inf. With return_filtered_entropy or return_confidence, a tuple of the
        Sample and what they ask for, in this order.

    Raises ValueError for arguments that do not fit together, TypeError for a seed that is no integer.
    """
    if logits.dim() == 0 or logits.dtype not in LOGITS_DTYPES or logits.shape[-1] == 0:
        raise ValueError(f"sample: logits is {shown(logits)}; floating [..., V], V > 0, is needed")
    shape = logits.shape[:-1]
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_one_device("sample", logits=logits, seed=seed, **filters)
    check_last_dim("sample", "logits", logits)
    filters = by_row("sample", shape, **filters)
    seed = seed_tensor("sample", seed, shape, logits.device)
    logits = logits.detach().reshape(shape.numel(), logits.shape[-1])
    asked = {"return_filtered_entropy": return_filtered_entropy, "return_confidence": return_confidence}
    if logits.is_cuda:
        warn_once("sample", logits.device)
        result = reference.sample(logits, uniforms_of(seed, SAMPLE, len(logits), 1)[:, 0], **filters, **asked)
        drawn, *more = result if any(asked.values()) else (result,)
    else:
        ids, reals = _native.sample(logits, seed, *filter_arguments(logits, **filters), return_confidence)
        token, argmax = ids.unbind()
        prob, logprob, entropy, margin, max_prob, pivot, normaliser, filtered_entropy, *confidence = reals.unbind()
        drawn = Sample(token, prob, logprob, entropy, margin, argmax, max_prob, pivot, normaliser)
        more = [filtered_entropy, *confidence] if return_filtered_entropy else confidence
    drawn = Sample(*(field.view(shape) for field in drawn))
    return (drawn, *(each.view(shape) for each in more)) if more else drawn


@torch.library.register_fake("dflash_ext::sample")
def _(logits, seed, *others):
    *_, confidence = others
    rows = logits.shape[0]
    return (
        logits.new_empty(2, rows, dtype=torch.int64),
        logits.new_empty(9 if confidence else 8, rows, dtype=real_dtype(logits)),
    )
