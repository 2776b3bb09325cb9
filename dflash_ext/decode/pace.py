"""Chooses how many tokens the next cycle drafts, from what was accepted so far and from what cycles cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul

MEMORY = 0.98  # the weight of earlier cycles, per cycle of a row
FIRST_GUESS = 0.7  # the rate at which a first drafted token is taken to be accepted before anything is known
TRUST = 2.0  # as many cycles as an estimate counts, which a position takes over from the one before
RUNS = 3  # a cost is the shortest time of so many cycles, as a disturbance only adds to it
PROBE = 64  # among so many cycles without a draft one has the shortest draft, to see whether drafting pays again
# What drafts may cost beyond what they gain: plain cycles, and a share of all of the time.
LOSS, LOSS_SHARE = 1.0, 0.01


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
        self.drafting: dict[int, dict[int, float]] = {rows: {} for rows in self.seconds}
        self.runs: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        self.made: dict[int, tuple[dict[int, float] | None, int]] = {}  # what `_made` gives, until something is added
        for rows, table in self.seconds.items():
            for width, seconds in table.items():
                if not 0 < seconds < math.inf:
                    raise ValueError(f"costs has {seconds} s for {width} tokens in {rows} rows: above 0 is needed")
        if self.is_given and not any(table.keys() >= {0, widths[-1]} for table in self.seconds.values()):
            raise ValueError(f"costs has no table with the costs of cycles that draft 0 and {widths[-1]} tokens")

    def add(self, rows: int, width: int, seconds: float, drafting: float) -> None:
        """Takes note of what a cycle took, and how much of it passed until the draft was there."""
        runs = self.runs[rows, width]
        runs.append((seconds, drafting))
        self.made.clear()
        for table, values in zip((self.seconds, self.drafting), zip(*runs, strict=True), strict=True):
            table.setdefault(rows, {})[width] = min(values)

    def is_measured(self, rows: int, width: int) -> bool:
        return self.is_given or len(self.runs.get((rows, width), ())) >= RUNS

    def table(self, rows: int) -> dict[int, float] | None:
        """The costs of all widths, None as long as nothing can be said of them."""
        return self._made(rows)[0]

    def tables(self) -> dict[int, dict[int, float]]:
        """The table of each number of rows that cycles had, with estimates in the place of what is not measured."""
        tables = {rows: self.table(rows) for rows in self.seconds}
        return {rows: table for rows, table in tables.items() if table is not None}

    def choose(self, rows: int, pace: Pace) -> int:
        """The number of tokens that a cycle of so many rows drafts: at most the next one after those measured."""
        table, most = self._made(rows)
        return 0 if table is None else pace.choose(table, most)

    def of(self, rows: int, width: int) -> float:
        """The cost of a cycle over that of a plain one."""
        table = self.table(rows)
        return table[width] / table[0] if table else 1.0

    def _made(self, rows: int) -> tuple[dict[int, float] | None, int]:
        """The table, and the longest draft that may be run."""
        if rows in self.made:
            return self.made[rows]
        like, table, most = self._like(rows), None, 0
        if like is not None:
            measured = self.seconds.get(rows, {})
            ratios = [seconds / self._estimate(like, width) for width, seconds in measured.items()]
            scale = sum(ratios) / len(ratios) if ratios else 1.0
            table = {width: measured.get(width, scale * self._estimate(like, width)) for width in self.widths}
            longest = max(self.seconds[like])
            most = next((width for width in self.widths if width > longest), longest)
        self.made[rows] = table, most
        return table, most

    def _like(self, rows: int) -> int | None:
        """The number of rows whose measurements tell most of cycles with so many rows."""
        like = [
            other
            for other, table in self.seconds.items()
            if 0 in table and self.is_measured(other, 0) and (self.is_given or max(other, rows) <= 2 * min(other, rows))
        ]
        nearest = sorted(like, key=lambda other: abs(math.log(other / rows)))
        return max(nearest, key=lambda other: len(self.seconds[other]), default=None)

    def _estimate(self, rows: int, width: int) -> float:
        """The cost of a width with so many rows, on the straight line through its neighbours.

        Beyond the longest draft, drafting is taken to last as long as for that one, and each more token to verify as
        long as one of those did. (A LoRA drafter's forward costs more than a draft of one token can save, but hardly
        more for a longer one. On a CPU every token of many rows costs as much as a plain cycle.)
        """
        table = self.seconds[rows]
        if width in table:
            return table[width]
        known = sorted(table)
        longest = known[-1]
        if width > longest:
            verifying = table[longest] - table[0] - self.drafting[rows].get(longest, 0.0)
            return table[longest] + max(verifying, 0.0) * (width / longest - 1) if longest else table[0]
        above = next(each for each in known if each > width)
        below = max(each for each in known if each < above)
        return table[below] + (table[above] - table[below]) * (width - below) / (above - below)


class Pace:
    """Chooses the draft that promises the most tokens a second.

    The promise is `1 + sum over k of P(the first k tokens are accepted)` tokens, by the acceptance rate of each
    position, divided by the cost of the cycle. The choice depends on accepted counts of earlier cycles alone, so that
    output keeps the target's distribution; given the costs, equal seeds give equal choices.

    A promise may be wrong. So what drafts have cost beyond what they gained, together with what the next one is
    expected to lose, stays below LOSS plain cycles and LOSS_SHARE of the time. Otherwise nothing is drafted. What the
    next one is expected to gain counts for LOSS at most.

    Args:
        widths: the numbers of drafted tokens to choose from.
        lead: the number of cycles that pass, after one without a draft, until one verifies a draft again.
        groups: of a cycle of one forward. If so many tokens are accepted, the next cycle has no draft to verify.
    """

    def __init__(self, widths: Sequence[int], lead: int = 0, groups: int | None = None):
        self.widths, self.lead, self.groups = widths, lead, groups
        self.tried = [0.0] * widths[-1]
        self.kept = [0.0] * widths[-1]
        self.without = 0  # cycles without a draft in a row
        self.passed = 0.0  # the time of all cycles, in plain ones
        self.lost = 0.0  # of it, what drafts have cost beyond what they gained

    def observe(self, rows: Sequence[tuple[int, int]]) -> None:
        """Takes note of a cycle: the verified and the accepted drafted tokens of each row."""
        for verified, accepted in rows:
            if verified == 0:
                continue
            for position in range(len(self.tried)):
                reached = position < verified and accepted >= position
                self.tried[position] = MEMORY * self.tried[position] + reached
                self.kept[position] = MEMORY * self.kept[position] + (reached and accepted > position)
        self.lost -= sum(accepted for _, accepted in rows) / max(len(rows), 1)

    def spend(self, cycles: float) -> None:
        """Takes note of the time of a cycle, in plain ones."""
        self.passed += cycles
        self.lost += cycles - 1

    def rates(self) -> list[float]:
        """The estimated rate at which the token of each position is accepted if those before it are."""
        rates, before = [], FIRST_GUESS
        for tried, kept in zip(self.tried, self.kept, strict=True):
            before = (kept + TRUST * before) / (tried + TRUST)
            rates.append(before)
        return rates

    def promises(self) -> list[float]:
        """The expected number of tokens from a cycle, by the number of drafted tokens from 0 on."""
        chances = list(accumulate(self.rates(), mul))
        tokens = list(accumulate(chances, initial=1.0))
        if self.groups is None or self.groups > len(chances):
            return tokens
        without = chances[self.groups - 1]  # the share of drafts that a cycle follows which commits one token
        return [each if width < self.groups else (each + without) / (1 + without) for width, each in enumerate(tokens)]

    def choose(self, costs: Mapping[int, float], most: int) -> int:
        """The number of tokens to draft, at most `most`. costs: the seconds of a cycle for each of the widths."""
        promises = self.promises()
        cycles = {width: seconds / costs[0] for width, seconds in costs.items()}
        width = min(max(costs, key=lambda width: promises[width] / costs[width]), most)
        probes = not width and self.without >= PROBE - 1 and len(self.widths) > 1
        if probes:
            width = self.widths[1]
        loss = cycles[width] - promises[width] + probes * self.lead * (cycles[width] - 1)
        has_begun = probes and self.without >= PROBE
        if not has_begun and self.lost + max(loss, -LOSS) > LOSS + LOSS_SHARE * self.passed:
            width = 0
        if not width:
            self.without = min(self.without + 1, PROBE - 1)
        elif probes and self.without < PROBE - 1 + self.lead:
            self.without += 1
        else:
            self.without = 0
        return width
