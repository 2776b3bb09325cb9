"""Chooses how many tokens the next cycle drafts, from what was accepted so far and from what cycles cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

MEMORY = 0.98  # the weight of earlier cycles, per cycle of a row
FIRST_GUESS = 0.7  # the rate at which a first drafted token is taken to be accepted before anything is known
TRUST = 2.0  # as many cycles as an estimate counts, which a position takes over from the one before
RUNS = 3  # a cost is the time of the fastest of so many cycles
PROBE = 32  # among so many cycles without a draft one has the shortest draft, to see whether drafting pays again


def draft_widths(most: int) -> tuple[int, ...]:
    """The numbers of drafted tokens to choose from: 0, one less than powers of two, and `most`."""
    return tuple(sorted({0, most, *(width for width in (1, 3, 7, 15, 31) if width < most)}))


class Costs:
    """The seconds of a cycle, by its number of rows and of drafted tokens.

    They are measured once, in the first cycles of each kind, which decode tokens as all others do. What is not measured
    yet is estimated: between two measured widths along a straight line, and else from the table of a number of rows
    that is at most twice or half as large. A given table serves all numbers of rows.

    Args:
        widths: the numbers of drafted tokens to choose from.
        given: a table that replaces all measurements, as `tables` gave it in another run. Choices then repeat.
    """

    def __init__(self, widths: Sequence[int], given: Mapping[int, Mapping[int, float]] | None = None):
        self.widths = widths
        self.is_given = given is not None
        self.seconds: dict[int, dict[int, float]] = {rows: dict(table) for rows, table in (given or {}).items()}
        self.runs: Counter[tuple[int, int]] = Counter()
        if self.is_given and not any(self._is_known(rows) for rows in self.seconds):
            raise ValueError(f"costs has no table with the costs of cycles that draft 0 and {widths[-1]} tokens")

    def add(self, rows: int, width: int, seconds: float) -> None:
        """Takes note of what a cycle took."""
        table = self.seconds.setdefault(rows, {})
        table[width] = min(seconds, table.get(width, math.inf))
        self.runs[rows, width] += 1

    def is_measured(self, rows: int, width: int) -> bool:
        return self.is_given or self.runs[rows, width] >= RUNS

    def table(self, rows: int) -> dict[int, float] | None:
        """The costs of all widths, None as long as nothing can be said of them."""
        measured = self.seconds.get(rows, {})
        if self._is_known(rows):
            return {width: _between(measured, width) for width in self.widths}
        others = [other for other in self.seconds if self._is_known(other) and self._serves(other, rows)]
        if not others:
            return None
        near = self.seconds[min(others, key=lambda other: abs(math.log(other / rows)))]
        ratios = [seconds / _between(near, width) for width, seconds in measured.items()]
        scale = sum(ratios) / len(ratios) if ratios else 1.0
        return {width: measured.get(width, scale * _between(near, width)) for width in self.widths}

    def tables(self) -> dict[int, dict[int, float]]:
        """The table of each number of rows that cycles had, with estimates in the place of what is not measured."""
        tables = {rows: self.table(rows) for rows in self.seconds}
        return {rows: table for rows, table in tables.items() if table is not None}

    def first(self, rows: int) -> int:
        """The width to measure first, while there is no `table`: that of the drafter, then none."""
        return 0 if self.widths[-1] in self.seconds.get(rows, {}) else self.widths[-1]

    def _serves(self, other: int, rows: int) -> bool:
        return self.is_given or max(other, rows) <= 2 * min(other, rows)

    def _is_known(self, rows: int) -> bool:
        return self.seconds[rows].keys() >= {0, self.widths[-1]} if rows in self.seconds else False


def _between(table: Mapping[int, float], width: int) -> float:
    """The cost of a width on the straight line between the nearest ones of a table that has 0 and the widest."""
    if width in table:
        return table[width]
    below, above = max(known for known in table if known < width), min(known for known in table if known > width)
    part = (width - below) / (above - below)
    return (1 - part) * table[below] + part * table[above]


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
