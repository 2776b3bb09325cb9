"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..arguments import check_one_device, checked
from ..library import load
from ..reference import Sample
from .logits import LOGITS_DTYPES, check_last_dim, check_numbers, filter_arguments, real_dtype
from .random import SAMPLE, check_seed, uniforms_of
from .serving import warn_once

load()
_native = torch.ops.dflash_ext


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
    if logits.dim() != 2 or logits.dtype not in LOGITS_DTYPES or logits.shape[1] == 0:
        raise ValueError(f"sample: logits is {logits.dtype} {list(logits.shape)}; floating [N, V] is needed")
    rows = logits.shape[0]
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_one_device("sample", logits=logits, seed=seed, **filters)
    check_last_dim("sample", "logits", logits)
    check_seed("sample", seed, rows)
    check_numbers("sample", rows, **filters)
    logits = logits.detach()
    if not logits.is_cuda:
        ids, reals = _native.sample(logits, seed.contiguous(), *filter_arguments(logits, **filters))
        token, argmax = ids.unbind()
        prob, logprob, entropy, margin, max_prob, pivot, normaliser, filtered_entropy = reals.unbind()
        drawn = Sample(token, prob, logprob, entropy, margin, argmax, max_prob, pivot, normaliser)
        return (drawn, filtered_entropy) if return_filtered_entropy else drawn
    warn_once("sample", logits.device)
    return reference.sample(
        logits,
        uniforms_of(seed, SAMPLE, rows, 1)[:, 0],
        **filters,
        return_filtered_entropy=return_filtered_entropy,
    )


@torch.library.register_fake("dflash_ext::sample")
def _(logits, seed, *filters):
    rows = logits.shape[0]
    return (
        logits.new_empty(2, rows, dtype=torch.int64),
        logits.new_empty(8, rows, dtype=real_dtype(logits)),
    )
