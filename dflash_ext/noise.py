"""What a block or a canvas of masked diffusion starts from: which of its tokens are hidden."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A share that is fixed, or drawn anew each time, uniformly between two bounds.

    Raises:
        ValueError: the bounds are not shares, or in the wrong order.
    """

    low: float
    high: float

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"{self} is no share: a number from 0 to 1, or two bounds in rising order, are needed")

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"

    def draw(self, generator: torch.Generator | None = None) -> float:
        return self.low + (self.high - self.low) * float(torch.rand((), generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class MaskNoise:
    """Hides a share of the tokens of a block, as single tokens or as spans.

    Attributes:
        rate: the share of a block's tokens that is hidden. At least one token of a block is.
        span: the mean length of hidden spans, whose lengths follow a geometric distribution (SpanBERT, arXiv
            1907.10529). 1 hides single tokens. Spans may touch each other.

    Raises:
        ValueError: the rate is 0, or the span is below 1.
    """

    rate: Share = Share(0.25, 0.25)
    span: float = 1.0

    def __post_init__(self):
        if not self.rate.low > 0:
            raise ValueError(f"a mask rate of {self.rate} hides no token: a share above 0 is needed")
        if not 1 <= self.span < math.inf:
            raise ValueError(f"spans of {self.span} tokens: a mean length of at least 1 is needed")

    def draw(self, length: int, generator: torch.Generator | None = None) -> Tensor:
        """The hidden tokens of a block: bool [length].

        Exactly round(rate * length) tokens are hidden, each token equally often. Their spans stand at places drawn
        uniformly among the others, on a circle: a span may go on from the end of the block to its beginning.
        """
        count = min(max(round(self.rate.draw(generator) * length), 1), length)
        if self.span == 1:
            return torch.randperm(length, generator=generator) < count
        lengths = self._lengths(count, generator)
        # Each span stands before one of the tokens that stay, or behind the last of them.
        places = torch.randint(length - count + 1, lengths.shape, generator=generator)
        starts = places.sort().values + lengths.cumsum(0) - lengths
        edges = torch.zeros(length + 1, dtype=torch.int64)
        edges.index_add_(0, starts, torch.ones_like(starts)).index_add_(0, starts + lengths, -torch.ones_like(starts))
        turn = int(torch.randint(length, (), generator=generator))
        return (edges[:-1].cumsum(0) > 0).roll(turn)

    def _lengths(self, total: int, generator: torch.Generator | None) -> Tensor:
        """Lengths of spans that add up to `total`; the last one may be cut."""
        uniform = torch.rand(total, generator=generator, dtype=torch.float64)
        stop = 1 / self.span  # the probability that a span ends at a token
        lengths = 1 + (uniform.log() / math.log1p(-stop)).floor()
        ends = lengths.clamp(max=total).long().cumsum(0).clamp(max=total)
        lengths = ends.diff(prepend=ends.new_zeros(1))
        return lengths[lengths > 0]
