"""What cycles cost, by their numbers of rows and of drafted tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..checks import is_int

CATCHING_UP = 0  # stands in a table for the number of rows where a drafter reads what plain cycles have left for it
RUNS = 3  # a cost is the shortest time of so many cycles, as a disturbance only adds to it


def draft_widths(most: int) -> tuple[int, ...]:
    """The numbers of drafted tokens to choose from: 0, one less than powers of two, and `most`."""
    return tuple(sorted({0, most, *(width for width in (1, 3, 7, 15, 31) if width < most)}))


def rounded(tokens: int) -> int:
    """The next power of two."""
    return 1 << (tokens - 1).bit_length()


class Costs:
    """The seconds of a cycle, by its number of rows and of drafted tokens.

    In the place of no rows stand those in which the drafter reads what plain cycles have left for it, by the number of
    tokens, which is rounded up to a power of two.

    They are measured once, in the first cycles of each kind, which decode tokens as all others do: plain ones first,
    which lose nothing against plain decoding, and then drafts that grow as long as they promise to pay. What is not
    measured is estimated from the measured widths, and from the table of a number of rows that is at most twice or half
    as large. A given table serves all numbers of rows.

    Args:
        widths: the numbers of drafted tokens to choose from.
        given: a table that replaces all measurements, as `tables` gave it in another run. Choices then repeat.
        unknown: what a cycle with a draft is taken to cost, in plain ones, before any is measured.
        grows: whether every token that a drafter reads takes it time, as on a CPU.
    """

    def __init__(
        self,
        widths: Sequence[int],
        given: Mapping[int, Mapping[int, float]] | None = None,
        unknown: float = 1.0,
        grows: bool = False,
    ):
        self.widths, self.unknown, self.grows = widths, unknown, grows
        self.is_given = given is not None
        if self.is_given and not all(is_int(rows) and isinstance(table, Mapping) for rows, table in given.items()):
            raise TypeError(f"costs is {dict(given)}; seconds by number of rows and of drafted tokens are needed")
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

    def add_catching_up(self, tokens: int, seconds: float) -> None:
        """Takes note of the time in which the drafter has read so many tokens."""
        self.add(CATCHING_UP, rounded(tokens), seconds, 0.0)

    def knows_catching_up(self, tokens: int) -> bool:
        return self.is_measured(CATCHING_UP, rounded(tokens))

    def catching_up(self, tokens: int) -> float | None:
        """The seconds in which the drafter reads so many tokens, None as long as nothing is known of it.

        They are taken from the nearest number of tokens that is measured and not larger. On a CPU, where time grows
        with the tokens, they are as many times longer, but at most those of the next larger number.
        """
        table = self.seconds.get(CATCHING_UP)
        if not tokens or not table:
            return None if tokens else 0.0
        tokens = rounded(tokens)
        known = max((known for known in table if known <= tokens), default=min(table))
        longest = min((seconds for other, seconds in table.items() if other >= tokens), default=math.inf)
        return min(table[known] * max(1.0, tokens / known), longest) if self.grows else table[known]

    def is_measured(self, rows: int, width: int) -> bool:
        return self.is_given or len(self.runs.get((rows, width), ())) >= RUNS

    def table(self, rows: int) -> dict[int, float] | None:
        """The costs of all widths, None as long as nothing can be said of them."""
        return self._made(rows)[0]

    def tables(self) -> dict[int, dict[int, float]]:
        """The table of each number of rows that cycles had, with estimates in the place of what is not measured."""
        tables = {rows: table if rows == CATCHING_UP else self.table(rows) for rows, table in self.seconds.items()}
        return {rows: dict(table) for rows, table in tables.items() if table is not None}

    def longest(self, rows: int) -> int:
        """The longest draft that may be run: the next one after those measured."""
        return self._made(rows)[1]

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
            return table[longest] + max(verifying, 0.0) * (width / longest - 1) if longest else self.unknown * table[0]
        above = next(each for each in known if each > width)
        below = max(each for each in known if each < above)
        return table[below] + (table[above] - table[below]) * (width - below) / (above - below)
