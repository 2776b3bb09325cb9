"""Chooses how many tokens the next cycle drafts, from what was accepted so far and from what cycles cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

MEMORY = 0.98  # the weight of earlier cycles, per cycle of a row
FIRST_GUESS = 0.7  # the rate at which a first drafted token is taken to be accepted before anything is known
TRUST = 2.0  # as many cycles as an estimate counts, which a position takes over from the one before
ROW_MEMORY, ROW_TRUST = 0.9, 4.0  # of a row's own luck: the weight of earlier cycles, and the tokens that 1 counts
PROBE = 64  # among so many cycles without a draft one has the shortest draft, to see whether drafting pays again
# What drafts may cost beyond what they gain: a share of the plain cycles that are left (MOST_LEFT count at most), and a
# share of the time that has passed.
RISK, MOST_LEFT, SHARE = 0.02, 100, 0.01


@dataclass
class RowPace:
    """The drafted tokens of a row that were expected to be accepted, and those that were.

    luck: the accepted tokens of this row over those of a mean one.
    """

    expected: float = 0.0
    accepted: float = 0.0
    luck: float = 1.0

    def observe(self, expected: float, accepted: int) -> None:
        self.expected = ROW_MEMORY * self.expected + expected
        self.accepted = ROW_MEMORY * self.accepted + accepted
        self.luck = (self.accepted + ROW_TRUST) / (self.expected + ROW_TRUST)


@dataclass
class Rows:
    """The rows of a cycle: the luck of each, the tokens that each may yet decode, and whether others wait."""

    luck: Sequence[float]
    left: Sequence[int]
    others_wait: bool = False

    def __post_init__(self):
        self.most_luck, self.most_left = max(self.luck), max(self.left)
        self.each = list(zip(self.luck, self.left, strict=True))

    def saved(self, gain: float) -> float:
        """The plain cycles that a cycle saves in which a mean row has so many drafted tokens accepted.

        Where others wait, every token brings them nearer. Else the last row's end counts: the others leave, but the
        cycles go on.
        """
        if self.others_wait:
            return sum([min(luck * gain, left - 1) for luck, left in self.each]) / len(self.each)
        return self.most_left / max([left / (1 + min(luck * gain, left - 1)) for luck, left in self.each]) - 1


class Pace:
    """Chooses the draft that promises the most tokens a second.

    A mean row's promise is `1 + sum over k of P(the first k tokens are accepted)` tokens, by the acceptance rate of
    each position, and a row's own is by its luck so far. What counts is how many plain cycles that saves (`Rows.saved`)
    beside the cost of the cycle. The choice depends on accepted counts of earlier cycles alone, so that output keeps
    the target's distribution; given the costs, equal seeds give equal choices.

    A promise may be wrong. So what drafts have cost beyond what they gained, together with what the next one is
    expected to lose, stays below a share of what is left and of what has passed. Otherwise nothing is drafted.

    Args:
        widths: the numbers of drafted tokens to choose from.
        lead: the number of cycles that pass, after one without a draft, until one verifies a draft again.
        groups: of a cycle of one forward. If so many tokens are accepted, the next cycle has no draft to verify.

    Attributes:
        promises: the expected number of tokens from a cycle of a mean row, by the number of drafted tokens from 0 on.
    """

    def __init__(self, widths: Sequence[int], lead: int = 0, groups: int | None = None):
        self.widths, self.lead, self.groups = widths, lead, groups
        self.tried = [0.0] * widths[-1]
        self.kept = [0.0] * widths[-1]
        self.without = 0  # cycles without a draft in a row
        self.promises = self.promised()
        self.passed = 0.0  # the time of all cycles, in plain ones
        self.lost = 0.0  # of it, what drafts have cost beyond what they gained

    def observe(self, rows: Sequence[tuple[RowPace, int, int]], saved: float) -> None:
        """Takes note of a cycle: the verified and the accepted drafted tokens of each row, and the plain cycles that
        the accepted ones have saved."""
        self.lost -= saved
        drafted = [row for row in rows if row[1]]
        if not drafted:
            return
        promises = self.promises
        for row, verified, accepted in drafted:
            row.observe(promises[verified] - 1, accepted)
        decay = MEMORY ** len(drafted)
        reached = [(verified, accepted) for _, verified, accepted in drafted]
        for position in range(max(verified for verified, _ in reached)):
            reached = [row for row in reached if row[0] > position <= row[1]]
            self.tried[position] = decay * self.tried[position] + len(reached)
            self.kept[position] = decay * self.kept[position] + sum([row[1] > position for row in reached])
        self.promises = self.promised()

    def spend(self, width: int, cycles: float) -> None:
        """Takes note of a cycle that drafts so many tokens, and of its time in plain ones, catching up included."""
        self.passed += cycles
        self.lost += cycles - 1
        if not width:
            self.without = min(self.without + 1, PROBE - 1)
        elif PROBE - 1 <= self.without < PROBE - 1 + self.lead:
            self.without += 1
        else:
            self.without = 0

    def rest(self) -> None:
        """All rows have ended. What comes next stands by itself: it neither spends what was gained nor pays for it."""
        self.passed = self.lost = 0.0

    def rates(self) -> list[float]:
        """The estimated rate at which the token of each position is accepted if those before it are."""
        rates, before = [], FIRST_GUESS
        for tried, kept in zip(self.tried, self.kept, strict=True):
            before = (kept + TRUST * before) / (tried + TRUST)
            rates.append(before)
        return rates

    def promised(self) -> list[float]:
        """What `promises` are by what was observed so far."""
        chances = list(accumulate(self.rates(), mul))
        tokens = list(accumulate(chances, initial=1.0))
        if self.groups is None or self.groups > len(chances):
            return tokens
        without = chances[self.groups - 1]  # the share of drafts that a cycle follows which commits one token
        return [each if width < self.groups else (each + without) / (1 + without) for width, each in enumerate(tokens)]

    def choose(
        self, cycles: Mapping[int, float], rows: Rows, ready: Sequence[int], late: Callable[[], float] = lambda: 0.0
    ) -> int:
        """The number of tokens to draft.

        Args:
            cycles: the time of a cycle, in plain ones, for each of the widths that may be chosen, 0 among them.
            ready: the widths of cycles that can be run at once.
            late: gives the time in which the drafter reads what plain cycles have left for it, in plain cycles.
        """
        gains = {width: self.promises[width] - 1 for width in cycles}
        # A cycle saves at most the gain of the luckiest row. So a draft that cannot pay is known without its rows.
        saved = {
            width: rows.saved(gain) if 1 + rows.most_luck * gain > cycles[width] else 0.0
            for width, gain in gains.items()
        }
        width = max(cycles, key=lambda width: (1 + saved[width]) / cycles[width])
        probes = not width and self.without >= PROBE - 1 and len(cycles) > 1
        if probes:
            drafts = [each for each in cycles if each]
            width = min([each for each in drafts if each in ready] or drafts)
        if not width:
            return 0
        loss = cycles[width] - 1 + late() - saved[width] + probes * self.lead * (cycles[width] - 1)
        has_begun = probes and self.without >= PROBE
        if not has_begun and self.lost + max(loss, 0.0) > RISK * min(rows.most_left, MOST_LEFT) + SHARE * self.passed:
            width = 0
        return width
