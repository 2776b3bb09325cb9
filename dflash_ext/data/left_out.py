"""A count of what a reader could not use, so that nothing is left out silently."""

from __future__ import annotations

from collections import Counter

NAMED = 8  # the number of kinds that the line names; others are summed up


class LeftOut(Counter):
    """Counts what was left out by kind: `left_out["turns without text"] += 1`. As a string it is one line."""

    def __str__(self) -> str:
        named = [f"{kind} ({count})" for kind, count in self.most_common(NAMED)]
        if others := self.total() - sum(count for _, count in self.most_common(NAMED)):
            named.append(f"other kinds ({others})")
        return ", ".join(named)
