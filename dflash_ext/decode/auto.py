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

# If the last row may yet decode more tokens than these, one cycle's accepted tokens say little of when it will end, and
# its luck so far says more.
NEAR = 64
UNKNOWN = 1.75  # what the first draft of a graph is taken to cost, in plain cycles


class Auto:
    """Chooses before each cycle of an engine.

    Args:
        cycle, runner: the engine's.
        given: what cycles cost, as `Costs` takes it; None if that is to be measured.
    """

    def __init__(self, cycle: Cycle, runner: PlainRunner, given: Mapping[int, Mapping[int, float]] | None = None):
        self.cycle, self.runner = cycle, runner
        self.pace = Pace(draft_widths(cycle.width), cycle.lead, cycle.groups)
        steady = runner.is_steady
        self.costs = Costs(self.pace.widths, given, UNKNOWN if steady else 1.0, grows=not steady)

    def run(
        self, requests: Sequence[Request], drawing: Drawing, *, others_wait: bool
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """Runs a cycle of requests. Returns their records, and what takes note of its time once they can be read."""
        slots = [request.slot for request in requests]
        rows = Rows([request.pace.luck for request in requests], [request.left for request in requests], others_wait)
        size, width, table = self._plan(slots, drawing, rows)
        unread = self.cycle.unread(slots, width)
        late = self._late(unread, len(slots), table) if table else 0.0
        self.pace.spend(width, self.costs.of(size, width) + late)
        add_catching_up = self._timed_catch_up(slots, drawing, width, unread)
        if self.costs.is_measured(size, width):
            return self.runner.run(slots, drawing, width, size), add_catching_up
        records, cost = self.runner.timed_run(slots, drawing, width, size)

        def add() -> None:
            if add_catching_up is not None:
                add_catching_up()
            self.costs.add(size, width, *cost())

        return records, add

    def observe(self, rows: Sequence[tuple[Request, int, int]], *, others_wait: bool) -> None:
        """Takes note of a cycle before it is committed: each request's verified and accepted drafted tokens."""
        if not any(verified for _, verified, _ in rows):
            return
        luck, left = [request.pace.luck for request, *_ in rows], [request.left for request, *_ in rows]
        if others_wait or max(left) > NEAR:
            saved = Rows(luck, left, others_wait).saved(sum([accepted for *_, accepted in rows]) / sum(luck))
        else:
            saved = max(left) - max(n - accepted for n, (*_, accepted) in zip(left, rows, strict=True))
        self.pace.observe([(request.pace, verified, accepted) for request, verified, accepted in rows], saved)

    def _plan(self, slots: Sequence[int], drawing: Drawing, rows: Rows) -> tuple[int, int, Mapping[int, float] | None]:
        """The slots that the next cycle computes, the tokens that it drafts, and the costs with the slots of a plain
        one, if they are known."""
        count = len(slots)
        sizes = {width: self.runner.ready(count, drawing, width) for width in self.pace.widths}
        fitting = self.runner.fitting(count)
        plain_size = sizes[0] or fitting
        table = self.costs.table(plain_size)
        if table is None:
            return *self.runner.plan(count, drawing, 0, 0, rows.most_left), None
        plain = table[0]
        most = self.pace.widths[-1] if self.runner.is_steady else self.costs.longest(plain_size)
        cycles = {
            width: (self.costs.table(size or fitting) or table)[width] / plain
            for width, size in sizes.items()
            if width <= most
        }
        ready = [width for width in cycles if sizes[width]]

        def late() -> float:
            return self._late(self.cycle.unread(slots, self.cycle.width), count, table)

        width = other = self.pace.choose(cycles, rows, ready, late)
        if width not in ready and 0 in ready:
            # Many such cycles may be queued before the host reads what came of the first.
            known = [each for each in ready if not each or self.costs.is_measured(sizes[each], each)]
            other = self.pace.choose({each: cycles[each] for each in known}, rows, known, late)
        return *self.runner.plan(count, drawing, width, other, rows.most_left, plain), table

    def _late(self, unread: int, count: int, table: Mapping[int, float]) -> float:
        """How many plain cycles the drafter takes to read so many tokens of `count` rows.

        As long as no such time is measured, a drafter that reads them in a forward of its own is taken to need one
        plain cycle on a GPU, and on a CPU as long for each token as a plain cycle takes for a row. Features are taken
        to need no time.

        table: the costs with the slots of a plain cycle.
        """
        seconds = self.costs.catching_up(unread)
        if seconds is not None:
            return seconds / table[0]
        if not self.cycle.reads_by_forward:
            return 0.0
        return 1.0 if self.runner.is_steady else unread / count

    def _timed_catch_up(
        self, slots: Sequence[int], drawing: Drawing, width: int, unread: int
    ) -> Callable[[], None] | None:
        """Measures how long the drafter reads so many tokens before such a cycle, if that is not known. Returns what
        takes note of it.

        Before a cycle that has to be made ready the device has other work meanwhile, so that the time tells nothing.
        """
        if not unread or self.costs.knows_catching_up(unread) or not self.runner.ready(len(slots), drawing, width):
            return None
        seconds = self.runner.timed_catch_up(slots, width)
        return lambda: self.costs.add_catching_up(unread, seconds())
