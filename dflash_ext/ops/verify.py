"""Verifying a draft against the target's logits: speculative sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_operands, check_tensors, has_integers
from ..native import load
from ..reference import Verification
from .backends import warn_once
from .logits import LOGITS_DTYPES, as_contiguous, by_row, check_last_dim, filter_arguments, real_dtype
from .penalties import penalties, penalty_arguments
from .random import VERIFY, seed_tensor, uniforms_of

load()
_native = torch.ops.dflash_ext


def verify(
    draft_tokens: Tensor,
    target_logits: Tensor,
    *,
    draft_logits: Tensor | None = None,
    draft_pivot: Tensor | None = None,
    draft_normaliser: Tensor | None = None,
    seed: int | Tensor | torch.Generator | None = None,
    uniforms: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    token_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    table_rows: Tensor | None = None,
    draft_lens: Tensor | None = None,
) -> Verification:
    """The longest prefix of a draft that the target accepts, and the target's own token after it.

    At temperature 0, drafted tokens are accepted as long as they are the target's argmax, and the next token is the
    target's argmax. Above 0, token x is accepted with probability min(1, p(x) / q(x)), where p is the target's and q
    the draft's distribution. After the first rejection, the next token is drawn from the residual max(p - q, 0),
    normalised. If the whole draft is accepted, the next token is the bonus token, which is drawn from p. So the output
    is distributed as the target's own (arXiv 2211.17192, 2302.01318). The temperature and the filters of ``sample``
    apply to p and to q, with the same rules for NaN, +inf and odd filters.

    Args:
        draft_tokens: int64 ``[B, K]``.
        target_logits: ``[B, K + 1, V]``. Entry k is the target's prediction of draft token k, and the last one that of
            the bonus token. dtypes as in ``sample``. On the CPU, entries after the first rejected token are not read.
        draft_logits: ``[B, K, V]``, the logits from which the draft was drawn. None is for a draft that was not
            sampled, or not from left to right. Its q is a point mass: token x is accepted with probability p(x), and
            the residual is p without x.
        draft_pivot, draft_normaliser: ``[B, K]`` from the draft's ``Sample``, so that q is exactly the distribution of
            the draw. Without them, q is filtered again.
        seed: as in ``sample``, with ``[B]`` for a seed per row. The draw of the draft may have the same seed.
        uniforms: ``[B, K + 1]`` in [0, 1), in the place of a seed: one for each draft token, and the last for the draw.
        temperature, top_k, top_p, min_p: numbers, or tensors of no dimensions or ``[B]``. Rows of temperature 0 and of
            higher temperatures may be mixed.
        repetition_penalty, presence_penalty, frequency_penalty, token_counts, logit_bias, table_rows: as in ``sample``,
            with B for N. They apply to the target. Its entry k counts, beside ``token_counts``, the drafted tokens
            before k. The draft need not have had them, because any q is lawful; but q is what it was drawn from, so
            that ``draft_logits`` are those after the draft's own penalties and bias.
        draft_lens: int ``[B]``, the number of drafted tokens in each row. Later ones are ignored. The default is K.

    Returns:
        Verification: ``accepted`` int64 ``[B]``, from 0 to draft_lens, and ``next_token`` int64 ``[B]``.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type, and on the CPU
    RuntimeError for a draft token outside the vocabulary. On CUDA, where the check would have to wait for the GPU, such
    a token is rejected.
    """
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tables = {"token_counts": token_counts, "logit_bias": logit_bias, "table_rows": table_rows}
    numbers = {
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    reals = {
        "draft_logits": draft_logits,
        "draft_pivot": draft_pivot,
        "draft_normaliser": draft_normaliser,
        "uniforms": uniforms,
    }
    check_tensors(
        "verify",
        draft_tokens=draft_tokens,
        target_logits=target_logits,
        optional=reals | tables | {"draft_lens": draft_lens},
        numbers=filters | numbers,
    )
    check_operands("verify", draft_tokens=draft_tokens, seed=seed)
    if draft_tokens.dim() != 2 or draft_tokens.dtype != torch.int64:
        raise ValueError(
            f"verify: draft_tokens is {draft_tokens.dtype} {list(draft_tokens.shape)}; int64 [B, K] is needed"
        )
    batch, drafted = draft_tokens.shape
    if target_logits.dim() != 3 or target_logits.dtype not in LOGITS_DTYPES or target_logits.shape[2] == 0:
        raise ValueError(
            f"verify: target_logits is {target_logits.dtype} {list(target_logits.shape)}; floating "
            f"[{batch}, {drafted + 1}, V] is needed"
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
    for name, given in reals.items():
        if given is not None and given.dtype not in LOGITS_DTYPES:
            raise ValueError(f"verify: {name} is {given.dtype}; a floating dtype is needed")
    if draft_lens is not None and not has_integers(draft_lens):
        raise ValueError(f"verify: draft_lens is {draft_lens.dtype}; an integer dtype is needed")
    if (draft_pivot is None) != (draft_normaliser is None) or (draft_pivot is not None and draft_logits is None):
        raise ValueError("verify: draft_pivot and draft_normaliser come together, and with draft_logits")
    for name, given in (("target_logits", target_logits), ("draft_logits", draft_logits)):
        if given is not None:
            check_last_dim("verify", name, given)
    filters = by_row("verify", draft_tokens.shape[:1], **filters)
    changes = penalties("verify", target_logits, draft_tokens.shape[:1], **tables, **numbers)
    if seed is not None and uniforms is not None:
        raise ValueError("verify: seed and uniforms are both given; one of them is needed")
    rows = draft_tokens.shape[:1]
    if seed is not None:
        seed = seed_tensor("verify", seed, rows, draft_tokens.device)
    elif uniforms is None and (isinstance(temperature, Tensor) or temperature != 0):
        raise ValueError("verify: temperature > 0 needs random numbers, and none were given")
    if draft_logits is not None:
        dtype = torch.promote_types(target_logits.dtype, draft_logits.dtype)
        target_logits, draft_logits = target_logits.to(dtype), draft_logits.to(dtype)
    if not target_logits.is_cuda or target_logits.dtype != torch.float64:
        real = real_dtype(target_logits)
        return Verification(
            *_native.verify(
                draft_tokens.contiguous(),
                target_logits,
                draft_logits,
                as_contiguous(draft_pivot, real),
                as_contiguous(draft_normaliser, real),
                seed,
                as_contiguous(uniforms, torch.float64),
                as_contiguous(draft_lens, torch.int64),
                *filter_arguments(target_logits, **filters),
                *penalty_arguments(target_logits, changes),
            )
        )
    if seed is not None:
        uniforms = uniforms_of(seed, VERIFY, batch, drafted + 1)
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
        **changes,
    )


@torch.library.register_fake("dflash_ext::verify")
def _(draft_tokens, *others):
    return draft_tokens.new_empty(draft_tokens.shape[0]), draft_tokens.new_empty(draft_tokens.shape[0])
