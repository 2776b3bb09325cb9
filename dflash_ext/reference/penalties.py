"""The logit bias and the penalties in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import per_row, widened


def penalised_logits(
    logits: Tensor,
    *,
    repetition_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    token_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    table_rows: Tensor | None = None,
) -> Tensor:
    """Widened logits ``[N, V]`` after the bias and the penalties; see ``dflash_ext.sample``.

    The steps in their order, which is vLLM's (V1), with c = ``token_counts`` of the token:
      bias        x + bias.
      repetition  if c != 0: x / r where x > 0, otherwise x * r (CTRL, arXiv 1909.05858).
      frequency   if c > 0: x - c * frequency_penalty.
      presence    if c > 0: x - presence_penalty.
    None is off. In a tensor, a repetition penalty that is NaN or not above 0 and any other NaN are off.
    """
    x = widened(logits)
    if logit_bias is not None:
        x = x + of_rows(logit_bias, table_rows).to(x.dtype)
    if token_counts is None:
        return x
    counts = of_rows(token_counts, table_rows)
    repetition = per_row(1.0 if repetition_penalty is None else repetition_penalty, x)
    repetition = torch.where(repetition > 0, repetition, 1.0)
    x = torch.where(counts != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    for penalty, times in ((frequency_penalty, counts), (presence_penalty, 1)):
        if penalty is not None:
            x = torch.where(counts > 0, x - per_row(penalty, x).nan_to_num(nan=0.0) * times, x)
    return x


def of_rows(table: Tensor, rows: Tensor | None) -> Tensor:
    """The table's rows that belong to the rows of the logits; one of no rows belongs to all of them."""
    return table if rows is None or table.dim() == 1 else table[rows.long()]


def counts_before(token_counts: Tensor, drafts: Tensor) -> Tensor:
    """``token_counts [B, V]`` to those at every slot of a draft ``[B, K]``: int32 ``[B, K + 1, V]``.

    Slot k has the committed tokens and the drafts before k. Drafts outside the vocabulary count nowhere.
    """
    batch, drafted = drafts.shape
    vocab = token_counts.shape[1]
    known = ((drafts >= 0) & (drafts < vocab))[..., None]
    seen = torch.nn.functional.one_hot(drafts.clamp(0, vocab - 1), vocab) * known
    before = torch.cat([seen.new_zeros(batch, 1, vocab), seen.cumsum(1)[:, :drafted]], dim=1)
    counts = token_counts[:, None].expand_as(before)
    return torch.where(before > 0, counts.clamp(min=0) + before, counts).int()
