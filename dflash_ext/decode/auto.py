"""The block size "auto": decides what each cycle drafts, runs it, and takes note of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .costs import Costs, draft_widths
from .cycle import Cycle
from .drawing import Drawing
from .graphs import PlainRunner
from .pace import Pace, Rows
from .request import Request

UNKNOWN = 1.75  # what the first draft of a graph is taken to cost, in plain cycles


class Auto:
    """Chooses before each cycle of an engine.

    Args:
        cycle, runner: the engine's.
        given: what cycles cost, as `Costs` takes it; None if that is to be measured.
    """

    def __init__(self, cycle: Cycle, runner: PlainRunner, given: Mapping[int, Mapping[int, float]] | None = None):
        self.runner = runner
        self.pace = Pace(draft_widths(cycle.width), cycle.lead, cycle.groups)
        self.costs = Costs(self.pace.widths, given, UNKNOWN if runner.is_steady else 1.0)

    def run(
        self, requests: Sequence[Request], drawing: Drawing, *, others_wait: bool
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """Runs a cycle of requests. Returns their records, and what takes note of its time once they can be read."""
        runner, slots = self.runner, [request.slot for request in requests]
        rows = Rows([request.pace.luck for request in requests], [request.left for request in requests], others_wait)
        sizes = {width: runner.size(len(slots), drawing, width) for width in self.pace.widths}
        plain = self.costs.table(sizes[0])
        width, other = (0, 0) if plain is None else self._widths(rows, drawing, sizes, plain)
        size, width = runner.plan(len(slots), drawing, width, other, rows.most_left, plain and plain[0])
        self.pace.spend(width, self.costs.of(size, width))
        if self.costs.is_measured(size, width):
            return runner.run(slots, drawing, width, size), None
        records, cost = runner.timed_run(slots, drawing, width, size)
        return records, cost and (lambda: self.costs.add(size, width, *cost()))

    def observe(self, rows: Sequence[tuple[Request, int, int]], *, others_wait: bool) -> None:
        """Takes note of a cycle before it is committed: each request's verified and accepted drafted tokens."""
        if not any(verified for _, verified, _ in rows):
            return
        if others_wait:
            saved = sum(accepted for *_, accepted in rows) / len(rows)
        else:
            left = [request.left for request, *_ in rows]
            saved = max(left) - max(n - accepted for n, (*_, accepted) in zip(left, rows, strict=True))
        self.pace.observe([(request.pace, verified, accepted) for request, verified, accepted in rows], saved)

    def _widths(
        self, rows: Rows, drawing: Drawing, sizes: Mapping[int, int], plain: Mapping[int, float]
    ) -> tuple[int, int]:
        """How many tokens the next cycle is to draft, and how many of those that it can draft at once.

        sizes: the slots of a cycle that drafts so many tokens. plain: the costs with the slots of one without a draft.
        """
        most = self.pace.widths[-1] if self.runner.is_steady else self.costs.longest(sizes[0])
        costs = {
            width: (plain if size == sizes[0] else self.costs.table(size) or plain)[width]
            for width, size in sizes.items()
            if width <= most
        }
        ready = [width for width in costs if self.runner.is_ready(len(rows.left), drawing, width)]
        width = self.pace.choose(costs, rows, ready)
        if width in ready or 0 not in ready:
            return width, width
        return width, self.pace.choose({each: costs[each] for each in ready}, rows, ready)
