"""The difference in tau of two drafters on the same prompts, and how certain it is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..decode import Decoded

RESAMPLES = 10_000
COVERAGE = 0.95


class TauDifference(NamedTuple):
    """The second drafter's tau minus the first one's, and the interval that holds 95% of its bootstrap resamples."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        certain = "" if self.low <= 0 <= self.high else ", which is more than chance"
        return f"tau differs by {self.mean:+.3f} ({COVERAGE:.0%} interval {self.low:+.3f} to {self.high:+.3f}{certain})"


def tau_difference(first: Decoded, second: Decoded, *, seed: int = 0) -> TauDifference:
    """The paired bootstrap (Efron 1979) over prompts: each resample draws prompts, with both drafters' taus on them.

    Some prompts are easy for every drafter. Because both taus of a prompt are drawn together, this does not widen the
    interval.

    Args:
        first, second: runs over the same prompts in the same order.

    Raises:
        ValueError: the runs have different numbers of prompts.
    """
    if len(first.completions) != len(second.completions):
        raise ValueError(f"runs over {len(first.completions)} and {len(second.completions)} prompts are no pairs")
    pairs = zip(first.completions, second.completions, strict=True)
    differences = torch.tensor([theirs.tau - ours.tau for ours, theirs in pairs], dtype=torch.float64)
    count, generator = len(differences), torch.Generator().manual_seed(seed)
    means = torch.stack(
        [differences[torch.randint(count, (count,), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    outside = (1 - COVERAGE) / 2
    low, high = means.quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return TauDifference(float(differences.mean()), low, high)
