"""Runs cycles: as CUDA graphs on a GPU, by plain calls elsewhere."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import capture, warm_up
from .cycle import Cycle
from .drawing import Drawing
from .forward import ModuleForward
from .stopwatch import Stopwatch

# A graph has one number of rows. Slots beyond the rows that are decoded are filled up with the spare slot.
SIZES = (1, 2, 4, 8, 16, 32)
# A capture takes the host 6 to 14 ms. Before, it queues QUEUED seconds of cycles, or AHEAD cycles if it does not know
# how long they take, so that the device has work in the meantime.
QUEUED, AHEAD = 20e-3, 25
MISSED = 16  # A larger graph stands in for a smaller one so many times. Then the smaller one is made.

Cost = Callable[[], tuple[float, float]]  # what gives the seconds of a cycle, and those that passed while it drafted


def sizes_of(slots: int) -> list[int]:
    """The numbers of rows of an engine's graphs, ascending; the last one is that of all slots."""
    return [*(size for size in SIZES if size < slots), slots]


class PlainRunner:
    """Calls the cycle.

    Attributes:
        lag: the number of last cycles whose records the host need not have read before the next one.
        is_steady: whether a cycle hardly takes longer for more drafted tokens, as far as is known before it is run.
    """

    is_steady = False

    def __init__(self, cycle: Cycle):
        self.cycle = cycle
        self.device = cycle.state.device
        self.watch = Stopwatch(self.device)
        self.lag = int(self.device.type == "cuda")

    def plan(
        self, rows: int, drawing: Drawing, width: int, other: int, left: int, seconds: float | None = None
    ) -> tuple[int, int]:
        """The number of slots that the next cycle computes, and the number of tokens that it drafts.

        Args:
            width: the tokens that it is to draft. other: what it drafts if that is not ready.
            left: the number of tokens that the last of its rows may yet decode.
            seconds: what a plain cycle takes; None if that is not known.
        """
        return rows, width

    def fitting(self, rows: int) -> int:
        """The smallest number of slots of a cycle that has room for so many rows."""
        return rows

    def ready(self, rows: int, drawing: Drawing, width: int) -> int | None:
        """The smallest number of slots of such a cycle that can be run at once; None if none can."""
        return rows

    def run(self, slots: Sequence[int], drawing: Drawing, width: int, size: int | None = None) -> Tensor:
        """One cycle of the rows in these slots, which drafts `width` tokens. Returns their records as `Cycle` does.

        size: the number of slots that it computes, as `plan` gave it.

        If the cycle raises, the state is what it was before.
        """
        return self._run(slots, drawing, width, size, self.watch)

    def timed_run(
        self, slots: Sequence[int], drawing: Drawing, width: int, size: int | None = None
    ) -> tuple[Tensor, Cost]:
        """As `run`. Also returns what gives the seconds that the cycle took, and those that passed while it drafted, to
        be called when the records have been read.

        On a CPU the seconds are those of the processor in this thread, so that other work on the machine does not
        count.
        """
        clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        watch = Stopwatch(self.device)
        self.cycle.before(slots, width)
        self._wait()
        start = clock()
        records = self._run(slots, drawing, width, size, watch)
        self._wait()
        seconds = clock() - start
        self.watch.marks += watch.marks
        phases = watch.lap()
        drafting = seconds * phases["draft"] / sum(phases.values())
        return records, lambda: (seconds, drafting)

    def timed_catch_up(self, slots: Sequence[int], width: int) -> Callable[[], float]:
        """Does what is to be done before a cycle of the rows in these slots that drafts `width` tokens. Returns what
        gives the seconds by which that delays the cycle, to be called when its records have been read.

        On a GPU they are those of its stream, which may wait for the host.
        """
        watch, start = Stopwatch(self.device), time.thread_time()
        watch.start("catch up")
        self.cycle.before(slots, width)
        watch.stop()
        seconds = time.thread_time() - start
        return lambda: watch.lap()["catch up"] if watch.cuda else seconds

    def reset(self) -> None:
        """Forgets what depends on the tensors of the state."""

    def seconds(self) -> dict[str, float]:
        """The seconds of the phases of cycles ("draft", "verify", "commit") since the last call."""
        return self.watch.lap()

    def _run(self, slots: Sequence[int], drawing: Drawing, width: int, size: int | None, watch: Stopwatch) -> Tensor:
        numbers = self.cycle.state.numbers
        before = numbers.clone()
        filled = torch.tensor(self._filled(slots, size)).to(self.device, non_blocking=True)
        self.cycle.before(slots, width)
        try:
            records = self.cycle(filled, drawing, width, watch)
        except BaseException:
            numbers.copy_(before)
            raise
        self.cycle.after(slots, width)
        return records[: len(slots)]

    def _filled(self, slots: Sequence[int], size: int | None) -> list[int]:
        return [*slots, *[self.cycle.state.spare] * ((size or 0) - len(slots))]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Graph:
    """A captured cycle, the slots that it reads, the records that it writes, and how often it was replayed."""

    graph: torch.cuda.CUDAGraph
    slots: Tensor
    records: Tensor
    watch: Stopwatch
    shown: list[int]
    replays: int = 0


class GraphRunner(PlainRunner):
    """Replays CUDA graphs of the cycle, one for each number of slots, width and way of drawing.

    The first cycle of a kind makes its graph. Before, the host queues cycles that have a graph, if there are any, so
    that the device does not wait for the host. A graph for fewer rows is made only after a larger one has often stood
    in.

    Args:
        sizes: the numbers of slots of a graph, ascending; the last one is that of all slots.
    """

    is_steady = True

    def __init__(self, cycle: Cycle, sizes: Sequence[int]):
        super().__init__(cycle)
        self.sizes = sizes
        self.graphs: dict[tuple[int, Drawing, int], Graph] = {}
        self.missed: Counter[tuple[int, Drawing, int]] = Counter()
        self.pool: tuple[int, int] | None = None

    def plan(
        self, rows: int, drawing: Drawing, width: int, other: int, left: int, seconds: float | None = None
    ) -> tuple[int, int]:
        fitting, made = self.fitting(rows), self.ready(rows, drawing, width)
        is_made = made == fitting
        if made is not None and not is_made:
            key = fitting, drawing, width
            self.missed[key] += 1
            is_made = self.missed[key] < MISSED
        if is_made:
            self.lag = 1
            return made, width
        size, width_now = (made, width) if made is not None else (self.ready(rows, drawing, other), other)
        ahead = AHEAD if seconds is None else min(AHEAD, 1 + int(QUEUED / seconds))
        if size is None or self.lag > ahead:
            self.lag = 1
            return fitting, width
        # A row that ends meanwhile is known to have ended only when the host has read so far.
        self.lag = self.lag + 1 if left > ahead + 4 else 1
        return size, width_now

    def fitting(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

    def ready(self, rows: int, drawing: Drawing, width: int) -> int | None:
        for size in self.sizes:
            if size >= rows and (size, drawing, width) in self.graphs:
                return size
        return None

    def run(self, slots: Sequence[int], drawing: Drawing, width: int, size: int | None = None) -> Tensor:
        key = size or self.fitting(len(slots)), drawing, width
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        captured, filled = self.graphs[key], self._filled(slots, key[0])
        if captured.shown != filled:
            captured.slots.copy_(torch.tensor(filled), non_blocking=True)
            captured.shown = filled
        self.cycle.before(slots, width)
        captured.graph.replay()
        self.cycle.after(slots, width)
        captured.replays += 1
        return captured.records[: len(slots)]

    def timed_run(
        self, slots: Sequence[int], drawing: Drawing, width: int, size: int | None = None
    ) -> tuple[Tensor, Cost]:
        """As that of `PlainRunner`, but by the GPU's clock, so that the host's time does not count."""
        records = self.run(slots, drawing, width, size)
        last = self.graphs[size or self.fitting(len(slots)), drawing, width].watch.last()

        def cost() -> tuple[float, float]:
            phases = last()
            return sum(phases.values()), phases["draft"]

        return records, cost

    def reset(self) -> None:
        self.graphs.clear()

    def seconds(self) -> dict[str, float]:
        """All replays of a graph are taken to be as long as its last one."""
        total = defaultdict(float, super().seconds())
        for captured in self.graphs.values():
            if captured.replays:
                for phase, seconds in captured.watch.lap().items():
                    total[phase] += seconds * captured.replays
                captured.replays = 0
        return total

    def try_one(self) -> None:
        """Captures a cycle of one row. Raises what the capture does."""
        key = 1, Drawing(), self.cycle.width
        self.graphs[key] = self._capture(*key)

    def _capture(self, size: int, drawing: Drawing, width: int) -> Graph:
        """Only the spare slot is decoded while a graph is made, so that no row changes."""
        slots = torch.full((size,), self.cycle.state.spare, device=self.device)
        torch.cuda.current_blas_handle()  # its first use makes it, which may be no part of a capture
        if isinstance(self.cycle.target, ModuleForward):  # which may wait for the device
            warm_up(lambda: self.cycle(slots, drawing, width, Stopwatch(self.device)), self.device)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            return self._captured(slots, drawing, width, waits=False)
        except torch.OutOfMemoryError:  # what PyTorch's cache of memory has may suffice
            return self._captured(slots, drawing, width, waits=True)

    def _captured(self, slots: Tensor, drawing: Drawing, width: int, *, waits: bool) -> Graph:
        graph, watch = torch.cuda.CUDAGraph(), Stopwatch(self.device, captured=True)
        with capture(graph, pool=self.pool, waits=waits):
            records = self.cycle(slots, drawing, width, watch)
        return Graph(graph, slots, records, watch, shown=[])


def runner(cycle: Cycle) -> PlainRunner:
    """The runner for the devices and the dtype of the target.

    Whether a model's own modules can be captured, a first graph of one row finds out. A graph is of one device.
    """
    target = cycle.target.target
    halves = target.dtype in (torch.bfloat16, torch.float16)
    if cycle.state.device.type != "cuda" or not halves or target.is_spread:
        return PlainRunner(cycle)
    graphs = GraphRunner(cycle, sizes_of(cycle.state.spare))
    if isinstance(cycle.target, ModuleForward):
        try:
            cycle.target.lengthen_tables()
            graphs.try_one()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            name = type(cycle.target.target.model).__name__
            warnings.warn(f"{name} is decoded without CUDA graphs: {_reason(error)}", stacklevel=2)
            return PlainRunner(cycle)
    return graphs


def _reason(error: BaseException) -> str:
    """The first of the errors that led to this one, in a line, and where it was raised."""
    while error.__context__ is not None:
        error = error.__context__
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{str(error).partition(chr(10))[0]} ({where.filename}, line {where.lineno})"
