"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_operands, check_tensors, shown
from ..native import load
from ..reference import Sample
from ..reference.numerics import softcapped, widened
from .backends import warn_once
from .logits import LOGITS_DTYPES, by_row, cap_of, check_last_dim, filter_arguments, real_dtype
from .penalties import penalties, penalty_arguments
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
    softcap: float | None = None,
    repetition_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    token_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    table_rows: Tensor | None = None,
    return_filtered_entropy: bool = False,
    return_confidence: bool = False,
) -> Sample | tuple[Sample, Tensor] | tuple[Sample, Tensor, Tensor]:
    """Draws one token per row of ``logits [..., V]``, and measures the distribution of the draw. It has no gradient.

    Args:
        logits: float32, bfloat16, float16 or float64, the last dimension contiguous. They are read once if there are no
            filters.
        seed: the same seed gives the same tokens. It has one of three forms. An int, or an int64 tensor ``[]`` or
            ``[1]``: every row derives a random number of its own from the seed and its index. An int64 tensor
            ``[...]``, a seed for each row: a draw does not depend on the row's place in the batch. A torch.Generator,
            from which an int is drawn (not under torch.compile, which cannot trace one). In a captured CUDA graph, an
            int is a constant, and a tensor is read again in every replay.
        temperature: 0 takes the argmax (the lowest index among equals).
        top_k, top_p, min_p: filters, applied in this order after temperature. top_k None, 0 or -1, top_p None or
            >= 1, and min_p None or 0 are off. The most probable token is always kept.
        softcap: ``softcap * tanh(logits / softcap)`` comes before all else (Gemma's heads end so); None or 0 for none.
            On a GPU a draw without filters, tables and confidence applies it while it reads the logits.
        repetition_penalty, presence_penalty, frequency_penalty: as in vLLM. They change the logits of the tokens that a
            row has already, before the temperature, and so at temperature 0 too. The logit x of a token of the prompt
            or of the output becomes x / repetition_penalty where x > 0, and x * repetition_penalty elsewhere. That of a
            token of the output is then lowered by presence_penalty, and by frequency_penalty for each time that the
            token is there. None is off, as are 1 for the first and 0 for the others.
        token_counts: int32 ``[N, V]``, contiguous: how often each token is in a row's output, and -1 for a token that
            is in its prompt alone. ``count_tokens_`` keeps such a table. Penalties need it. N is the number of rows.
        logit_bias: floating ``[V]``, or ``[N, V]`` for one in each row. It is added to the logits before the
            penalties; -inf bans a token.
        table_rows: int ``[...]``, the rows of the tables token_counts ``[R, V]`` and logit_bias ``[R, V]`` that belong
            to the rows of logits, if the tables have other rows than these.
        return_filtered_entropy: also return the entropy of the distribution after the filters, ``[...]``.
        return_confidence: also return the token's probability under softmax(logits), at temperature 1 and before the
            filters, ``[...]``. LLaDA and Fast-dLLM call it the confidence and reveal positions by it, whatever the
            temperature of the draw. At other temperatures than 0 and 1 it costs another read of the logits.

    temperature, filters and penalties are numbers, or tensors of no dimensions or ``[...]``. Numbers out of range are
    refused. The values of a tensor are not checked, because nothing waits for them. So every value has a meaning there:
    a filter of NaN is off, a top_k below 1 is off and a fractional one is rounded down, a min_p above 1 counts as 1, a
    temperature that is NaN or below 1e-30 counts as 0, and one above 1e30 as 1e30. A repetition_penalty that is NaN or
    not above 0 is off, and so are other penalties of NaN. On CUDA, a table row that does not exist is not noticed.

    The rules below apply to the logits after the bias and the penalties. A logit that is NaN counts as -inf, so its
    token is never drawn. If all logits of a row are NaN, its token is 0, and its ``prob`` and measures are NaN. A row
    with a logit of +inf, for which softmax would give NaN, is a point mass at the first such token, whose ``prob`` is
    1.

    The filters keep or drop tokens of equal logits together. A pivot and a normaliser then describe the filtered
    distribution, and ``verify`` needs no second pass over the draft's logits. The filters of transformers sort the
    tokens, and may drop some of several equal tokens by their place in the sort. Tokens of different logits are treated
    alike by both. With bfloat16 logits, where ties are frequent, a top_p of 0.9 kept more tokens than transformers' in
    412 of 700 rows; the total variation between the two distributions was 0.002 on average and 0.08 at most.

    Returns:
        Sample, whose fields are ``[...]``. Reals are float32 (float64 for float64 logits).
        ``token`` (int64), and its ``prob`` and ``logprob``. ``entropy`` in nats, ``margin`` (p1 - p2), ``argmax`` and
        ``max_prob`` describe the distribution. All of these are after temperature and before the filters, and at
        temperature 1 for rows of temperature 0. ``pivot`` and ``normaliser`` are the filtered distribution in the form
        that ``verify`` takes: ``exp(z - normaliser)`` where ``z >= pivot``, else 0, for z = logits / temperature. A
        pivot may be -inf, and one of +inf marks a row with a logit of +inf.
        With return_filtered_entropy or return_confidence, a tuple of the Sample and what they ask for, in this order.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type.
    """
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tables = {"token_counts": token_counts, "logit_bias": logit_bias, "table_rows": table_rows}
    numbers = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    check_tensors("sample", logits=logits, optional=tables, numbers=filters | numbers)
    check_operands("sample", logits=logits, seed=seed)
    if logits.dim() == 0 or logits.dtype not in LOGITS_DTYPES or logits.shape[-1] == 0:
        raise ValueError(f"sample: logits is {shown(logits)}; floating [..., V], V > 0, is needed")
    shape = logits.shape[:-1]
    check_last_dim("sample", "logits", logits)
    filters, softcap = by_row("sample", shape, **filters), cap_of("sample", softcap)
    changes = penalties("sample", logits, shape, **tables, **numbers)
    seed = seed_tensor("sample", seed, shape, logits.device)
    logits = logits.detach().reshape(shape.numel(), logits.shape[-1])
    is_plain = not return_confidence and all(x is None for x in (top_k, top_p, min_p, token_counts, logit_bias))
    if softcap and not (is_plain and logits.is_cuda and logits.dtype != torch.float64):
        logits, softcap = softcapped(widened(logits), softcap), 0.0
    asked = {"return_filtered_entropy": return_filtered_entropy, "return_confidence": return_confidence}
    if logits.is_cuda and logits.dtype == torch.float64:
        warn_once("sample", logits.device)
        result = reference.sample(
            logits, uniforms_of(seed, SAMPLE, len(logits), 1)[:, 0], **filters, **changes, **asked
        )
        drawn, *more = result if any(asked.values()) else (result,)
    else:
        arguments = *filter_arguments(logits, **filters), *penalty_arguments(logits, changes)
        cap = {"softcap": softcap} if softcap else {}
        ids, reals = _native.sample(logits, seed, *arguments, return_confidence, **cap)
        drawn, filtered_entropy, *confidence = unpacked(ids, reals)
        more = [filtered_entropy, *confidence] if return_filtered_entropy else confidence
    drawn = Sample(*(field.view(shape) for field in drawn))
    return (drawn, *(each.view(shape) for each in more)) if more else drawn


def unpacked(ids: Tensor, reals: Tensor) -> tuple[Sample | Tensor, ...]:
    """The Sample that a kernel wrote (csrc/sample/params.h), the entropy after the filters, and the confidence if asked
    for, each of them [N]."""
    token, argmax = ids.unbind()
    prob, logprob, entropy, margin, max_prob, pivot, normaliser, *more = reals.unbind()
    return Sample(token, prob, logprob, entropy, margin, argmax, max_prob, pivot, normaliser), *more


@torch.library.register_fake("dflash_ext::sample")
def _(logits, seed, *others, softcap=0.0):
    confidence = others[17]
    rows = logits.shape[0]
    return (
        logits.new_empty(2, rows, dtype=torch.int64),
        logits.new_empty(9 if confidence else 8, rows, dtype=real_dtype(logits)),
    )
