"""Figures of generated text, and intervals of figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models import Target
from ..ops import linear_cross_entropy

RESAMPLES = 2_000
COVERAGE = 0.95
ROWS = 8  # sequences whose likelihood is taken at a time


def filler_rate(text: str) -> float:
    """The share of characters that are commas, digits or white space; 0 for an empty text.

    It is high where a sampler has fallen back on tokens of little content.
    """
    return sum(character == "," or character.isdigit() or character.isspace() for character in text) / max(len(text), 1)


def bigram_repetition(tokens: Sequence[int]) -> float:
    """The share of pairs of neighbouring tokens that the sequence has had before."""
    pairs = list(zip(tokens[:-1], tokens[1:], strict=True))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def distinct(sequences: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n (arXiv 1510.03055): different runs of n tokens, by the number of all of them in all sequences."""
    runs = [tuple(tokens[at : at + n]) for tokens in sequences for at in range(len(tokens) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def last_number(text: str) -> float | None:
    """The last number of a text, which in answers to exercises in arithmetic (GSM8K) is the result; None without one.

    Commas between digits are left out.
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer ends with the number with which the right answer does."""
    number = last_number(answer)
    return number is not None and number == last_number(reference)


@torch.no_grad()
def answer_nll(target: Target, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """The mean negative log-likelihood, in nats, of each answer's tokens behind its prompt; NaN for an empty answer.

    Args:
        target: a causal LM under its own masks.
        prompts: token ids, at least one per prompt.
    """
    found = []
    for first in range(0, len(prompts), ROWS):
        pairs = list(zip(prompts[first : first + ROWS], answers[first : first + ROWS], strict=True))
        rows = pad_sequence([torch.tensor([*prompt, *answer]) for prompt, answer in pairs], batch_first=True)
        column, lengths = (
            torch.arange(rows.shape[1]),
            torch.tensor([[len(prompt), len(answer)] for prompt, answer in pairs]),
        )
        counts = (column >= lengths[:, :1]) & (column < lengths.sum(1, keepdim=True))
        hidden = target.features_and_hidden(rows.to(target.device))[1]
        result = linear_cross_entropy(
            hidden[:, :-1].to(target.head.dtype),
            target.head,
            rows[:, 1:].to(target.device),
            counts[:, 1:].float().to(target.device),
            reduction="none",
            softcap=target.softcap,
        )
        found += (result.loss.sum(1).cpu() / lengths[:, 1]).tolist()
    return found


def as_json(figures: Any) -> Any:
    """Figures in dicts and sequences, with None for those that are NaN or infinite, which JSON does not have."""
    if isinstance(figures, Mapping):
        return {name: as_json(figure) for name, figure in figures.items()}
    if isinstance(figures, list | tuple):
        return [as_json(figure) for figure in figures]
    return None if isinstance(figures, float) and not isfinite(figures) else figures


class Interval(NamedTuple):
    """A figure, and the interval that holds 95% of its bootstrap resamples."""

    mean: float
    low: float
    high: float

    def shown(self, form: str) -> str:
        """The figure and how far the interval reaches from it, each in this format; "-" if the figure is NaN."""
        reach = max(self.mean - self.low, self.high - self.mean)
        return "-" if isnan(self.mean) else f"{self.mean:{form}} ±{reach:{form.lstrip('+')}}"


def resamples(count: int, seed: int = 0) -> Tensor:
    """How often each of `count` samples is in each resample of the bootstrap (Efron 1979): float64 [RESAMPLES, count].

    The same resamples for several systems make their differences paired.
    """
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())


def interval(figure: float, resampled: Tensor) -> Interval:
    """The interval of a figure, given what it is in each resample. NaN in a resample does not count."""
    outside = (1 - COVERAGE) / 2
    low, high = resampled.nanquantile(torch.tensor([outside, 1 - outside], dtype=resampled.dtype)).tolist()
    return Interval(figure, low, high)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """The mean of samples and its interval; NaN does not count. None if there is nothing to count."""
    kept = torch.tensor([value for value in values if value == value], dtype=torch.float64)
    if not len(kept):
        return None
    return interval(kept.mean().item(), resamples(len(kept), seed) @ kept / len(kept))
