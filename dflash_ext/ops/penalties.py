"""Penalties of ``sample`` and ``verify``: their arguments, and the count of the tokens that rows have already."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensors, has_integers, shown
from .logits import as_contiguous, by_row, number_and_tensor, real_dtype

_OFF = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def count_tokens_(
    token_counts: Tensor,
    tokens: Tensor,
    *,
    lens: Tensor | None = None,
    table_rows: Tensor | None = None,
    prompt: bool = False,
) -> Tensor:
    """Counts tokens in place, for the penalties of ``sample`` and ``verify``. It can be captured in a CUDA graph.

    Args:
        token_counts: int32 ``[R, V]``, contiguous: how often each token is in a row's output, and -1 for a token that
            is in its prompt alone. Zeros belong to a row without any token.
        tokens: int64 ``[B, K]``. Those outside of the vocabulary, such as padding, are not counted.
        lens: int ``[B]``, the number of tokens to count in each row. The default is K.
        table_rows: int ``[B]``, the rows of ``token_counts`` that belong to the rows of tokens, each of them once.
            Without it row b has row b.
        prompt: whether the tokens are those of the prompt. Those that are not in the output are marked with -1.

    Returns token_counts. Raises ValueError for arguments that do not fit together, TypeError for one of another type.
    """
    optional = {"lens": lens, "table_rows": table_rows}
    check_tensors("count_tokens_", token_counts=token_counts, tokens=tokens, optional=optional)
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"count_tokens_: tokens is {shown(tokens)}; int64 [B, K] is needed")
    batch, count = tokens.shape
    vocab = token_counts.shape[-1] if token_counts.dim() else 0
    _check_counts("count_tokens_", token_counts, vocab, None if table_rows is not None else batch)
    for name, given in optional.items():
        if given is not None and (given.shape != (batch,) or not has_integers(given)):
            raise ValueError(f"count_tokens_: {name} is {shown(given)}; int [{batch}] is needed")
    if table_rows is None:
        table_rows = torch.arange(batch, device=tokens.device)
    counted = (tokens >= 0) & (tokens < vocab)
    if lens is not None:
        counted &= torch.arange(count, device=tokens.device) < lens.long()[:, None]
    # What is not counted goes to the row's first token, and changes nothing there.
    place = (table_rows.long()[:, None] * vocab + tokens.where(counted, 0)).flatten()
    counted, flat = counted.flatten(), token_counts.view(-1)
    if prompt:
        unseen = counted & (flat.gather(0, place) == 0)
        flat.scatter_reduce_(0, place, torch.where(unseen, -1, torch.iinfo(torch.int32).max).int(), "amin")
    else:
        counted = counted.int()
        flat.scatter_reduce_(0, place, counted - 1, "amax")  # -1, for the prompt, becomes 0
        flat.scatter_add_(0, place, counted)
    return token_counts


def penalties(
    op: str,
    logits: Tensor,
    rows: torch.Size,
    *,
    token_counts: Tensor | None,
    logit_bias: Tensor | None,
    table_rows: Tensor | None,
    **numbers: float | Tensor | None,
) -> dict[str, float | Tensor | None]:
    """Checks the penalties and the bias of rows of ``logits [..., V]``. Returns what is given of them, flat over rows.

    The result is empty if neither counts nor a bias is given, and the logits remain as they are.
    """
    vocab, count = logits.shape[-1], rows.numel()
    numbers = by_row(op, rows, **numbers)
    if token_counts is None and any(value is not None for value in numbers.values()):
        given = ", ".join(name for name, value in numbers.items() if value is not None)
        raise ValueError(f"{op}: {given} needs token_counts, which is not given")
    if table_rows is not None:
        if table_rows.shape != rows or not has_integers(table_rows):
            raise ValueError(f"{op}: table_rows is {shown(table_rows)}; int {list(rows)} is needed")
        table_rows = as_contiguous(table_rows.flatten(), torch.int64)
    if token_counts is not None:
        _check_counts(op, token_counts, vocab, None if table_rows is not None else count)
    if logit_bias is not None:
        fits = logit_bias.shape[-1:] == (vocab,) and logit_bias.dim() in (1, 2) and logit_bias.is_floating_point()
        if not fits or (logit_bias.dim() == 2 and table_rows is None and len(logit_bias) != count):
            raise ValueError(
                f"{op}: logit_bias is {shown(logit_bias)}; floating [{vocab}] or [{count}, {vocab}] is needed"
            )
        logit_bias = as_contiguous(logit_bias.detach(), real_dtype(logits))
    given = {"token_counts": token_counts, "logit_bias": logit_bias, "table_rows": table_rows} | numbers
    return {} if token_counts is None and logit_bias is None else {n: x for n, x in given.items() if x is not None}


def penalty_arguments(logits: Tensor, penalties: dict[str, float | Tensor | None]) -> tuple[float | Tensor | None, ...]:
    """The result of ``penalties`` as arguments of a native operator."""
    given = ((penalties.get(name), off) for name, off in _OFF.items())
    numbers, tensors = zip(*(number_and_tensor(value, off, real_dtype(logits)) for value, off in given), strict=True)
    return *(penalties.get(name) for name in ("token_counts", "logit_bias", "table_rows")), *numbers, *tensors


def _check_counts(op: str, token_counts: Tensor, vocab: int, rows: int | None) -> None:
    fits = vocab > 0 and token_counts.dim() == 2
    fits = fits and token_counts.dtype == torch.int32 and token_counts.is_contiguous()
    if not fits or token_counts.shape[1] != vocab or rows not in (None, len(token_counts)):
        rows = "R" if rows is None else rows
        raise ValueError(f"{op}: token_counts is {shown(token_counts)}; contiguous int32 [{rows}, {vocab}] is needed")
