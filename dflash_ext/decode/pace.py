"""Chooses how many tokens the next cycle drafts, from what was accepted so far and from what cycles cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

MEMORY = 0.98  # the weight of earlier cycles, per cycle of a row
FIRST_GUESS = 0.7  # the rate at which a first drafted token is taken to be accepted before anything is known
TRUST = 2.0  # as many cycles as an estimate counts, which a position takes over from the one before
RUNS = 3  # a cost is the median time of so many cycles
PROBE = 64  # among so many cycles without a draft one has the shortest draft, to see whether drafting pays again


def draft_widths(most: int) -> tuple[int, ...]:
    """The numbers of drafted tokens to choose from: 0, one less than powers of two, and `most`."""
    return tuple(sorted({0, most, *(width for width in (1, 3, 7, 15, 31) if width < most)}))


class Costs:
    """The seconds of a cycle, by its number of rows and of drafted tokens.

    They are measured once, in the first cycles of each kind, which decode tokens as all others do: plain ones first,
    which lose nothing against plain decoding, and then drafts that grow as long as they promise to pay. What is not
    measured is estimated from the measured widths, and from the table of a number of rows that is at most twice or half
    as large. A given table serves all numbers of rows.

    Args:
        widths: the numbers of drafted tokens to choose from.
        given: a table that replaces all measurements, as `tables` gave it in another run. Choices then repeat.
    """

    def __init__(self, widths: Sequence[int], given: Mapping[int, Mapping[int, float]] | None = None):
        self.widths = widths
        self.is_given = given is not None
        self.seconds: dict[int, dict[int, float]] = {rows: dict(table) for rows, table in (given or {}).items()}
        self.runs: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        for rows, table in self.seconds.items():
            for width, seconds in table.items():
                if not 0 < seconds < math.inf:
                    raise ValueError(f"costs has {seconds} s for {width} tokens in {rows} rows: above 0 is needed")
        if self.is_given and not any(table.keys() >= {0, widths[-1]} for table in self.seconds.values()):
            raise ValueError(f"costs has no table with the costs of cycles that draft 0 and {widths[-1]} tokens")

    def add(self, rows: int, width: int, seconds: float) -> None:
        """Takes note of what a cycle took."""
        self.runs[rows, width].append(seconds)
        self.seconds.setdefault(rows, {})[width] = median(self.runs[rows, width])

    def is_measured(self, rows: int, width: int) -> bool:
        return self.is_given or len(self.runs.get((rows, width), ())) >= RUNS

    def table(self, rows: int) -> dict[int, float] | None:
        """The costs of all widths, None as long as nothing can be said of them."""
        base = self._base(rows)
        if base is None:
            return None
        measured = self.seconds.get(rows, {})
        ratios = [seconds / _estimate(base, width) for width, seconds in measured.items()]
        scale = sum(ratios) / len(ratios) if ratios else 1.0
        return {width: measured.get(width, scale * _estimate(base, width)) for width in self.widths}

    def tables(self) -> dict[int, dict[int, float]]:
        """The table of each number of rows that cycles had, with estimates in the place of what is not measured."""
        tables = {rows: self.table(rows) for rows in self.seconds}
        return {rows: table for rows, table in tables.items() if table is not None}

    def choose(self, rows: int, pace: Pace) -> int:
        """The number of tokens that a cycle of so many rows drafts.

        Until two drafts show how fast costs grow, longer ones are taken to cost as much as the longest one so far. If
        one of them would pay most, the next longer one is run. (A LoRA drafter's forward costs more than a draft of one
        token can save.)
        """
        table, base = self.table(rows), self._base(rows)
        if table is None:
            return 0
        if len(base) > 2 or self.widths[-1] in base:
            return pace.choose(table)
        return min(pace.choose(table), self.widths[self.widths.index(max(base)) + 1])

    def _base(self, rows: int) -> dict[int, float] | None:
        """The measurements that tell most of cycles with so many rows."""
        like = [
            other
            for other, table in self.seconds.items()
            if 0 in table and self.is_measured(other, 0) and (self.is_given or max(other, rows) <= 2 * min(other, rows))
        ]
        nearest = sorted(like, key=lambda other: abs(math.log(other / rows)))
        return max((self.seconds[other] for other in nearest), key=len, default=None)


def _estimate(table: Mapping[int, float], width: int) -> float:
    """The cost of a width, on the straight line through its neighbours in a table that has 0.

    Beyond the widest it is on that of the two widest drafts, but not below the widest, and with one draft on its level.
    """
    if width in table:
        return table[width]
    known = sorted(table)
    above = next((each for each in known if each > width), known[-1])
    below = max((each for each in known if each < above), default=above)
    slope = (table[above] - table[below]) / max(above - below, 1)
    if width > above:
        slope = max(slope, 0.0) if len(known) > 2 else 0.0
    return table[above] + slope * (width - above)


class Pace:
    """Chooses the draft that promises the most tokens a second.

    The promise is `1 + sum over k of P(the first k tokens are accepted)` tokens, by the acceptance rate of each
    position, divided by the cost of the cycle. The choice depends on accepted counts of earlier cycles alone, so that
    output keeps the target's distribution; given the costs, equal seeds give equal choices.

    Args:
        widths: the numbers of drafted tokens to choose from.
        lead: the number of cycles that pass, after one without a draft, until one verifies a draft again.
    """

    def __init__(self, widths: Sequence[int], lead: int = 0):
        self.widths, self.lead = widths, lead
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
        best = max(costs, key=lambda width: expected[width] / costs[width])
        self.without = 0 if best else self.without + 1
        if self.without < PROBE or len(self.widths) == 1:
            return best
        if self.without == PROBE + self.lead:
            self.without = 0
        return self.widths[1]
