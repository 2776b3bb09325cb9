"""The difference in tau of two drafters on the same prompts, and how certain it is."""

from __future__ import annotations

from ..decode import Decoded
from .metrics import COVERAGE, Interval, mean_interval


class TauDifference(Interval):
    """The second drafter's tau minus the first one's, and the interval that holds 95% of its bootstrap resamples."""

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
    return TauDifference(*mean_interval([theirs.tau - ours.tau for ours, theirs in pairs], seed))
