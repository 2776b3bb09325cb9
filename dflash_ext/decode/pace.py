"""Chooses how many tokens the next cycle drafts, from what was accepted so far and from what cycles cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MEMORY = 0.98  # the weight of earlier cycles, per cycle of a row
FIRST_GUESS = 0.7  # the rate at which a first drafted token is taken to be accepted before anything is known
TRUST = 2.0  # as many cycles as an estimate counts, which a position takes over from the one before
PROBE = 32  # among so many cycles without a draft one has the shortest draft, to see whether drafting pays again


def draft_widths(most: int) -> tuple[int, ...]:
    """The numbers of drafted tokens to choose from: 0, one less than powers of two, and `most`."""
    return tuple(sorted({0, most, *(width for width in (1, 3, 7, 15, 31) if width < most)}))


class Pace:
    """Chooses the draft that promises the most tokens a second.

    The promise is `1 + sum over k of P(the first k tokens are accepted)` tokens, by the acceptance rate of each
    position, divided by the cost of the cycle. The choice depends on accepted counts of earlier cycles alone, so that
    output keeps the target's distribution; given the costs, equal seeds give equal choices.
    """

    def __init__(self, widths: Sequence[int]):
        self.widths = widths
        self.tried = [0.0] * widths[-1]
        self.kept = [0.0] * widths[-1]
        self.without = 0  # cycles without a draft in a row

    def observe(self, verified: int, accepted: int) -> None:
        """Takes note of a row's cycle, in which `accepted` of `verified` drafted tokens were accepted."""
        if verified == 0:
            return
        for position in range(len(self.tried)):
            reached = position < verified and accepted >= position
            self.tried[position] = MEMORY * self.tried[position] + reached
            self.kept[position] = MEMORY * self.kept[position] + (reached and accepted > position)

    def rates(self) -> list[float]:
        """The estimated rate at which the token of each position is accepted if those before it are."""
        rates, before = [], FIRST_GUESS
        for tried, kept in zip(self.tried, self.kept, strict=True):
            before = (kept + TRUST * before) / (tried + TRUST)
            rates.append(before)
        return rates

    def choose(self, costs: Mapping[int, float]) -> int:
        """The number of tokens to draft. costs: the seconds of a cycle for each of the widths."""
        expected, chance, tokens = {0: 1.0}, 1.0, 1.0
        for count, rate in enumerate(self.rates(), 1):
            chance *= rate
            tokens += chance
            expected[count] = tokens
        best = max(self.widths, key=lambda width: expected[width] / costs[width])
        self.without = 0 if best else self.without + 1
        if self.without < PROBE or len(self.widths) == 1:
            return best
        self.without = 0
        return self.widths[1]
