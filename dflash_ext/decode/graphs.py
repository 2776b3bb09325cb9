"""Runs cycles: as CUDA graphs on a GPU, by plain calls elsewhere."""

from __future__ import annotations

import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import capture, warm_up_stream
from .cycle import Cycle
from .drawing import Drawing
from .forward import ModuleForward
from .stopwatch import Stopwatch

# A graph has one number of rows. Slots beyond the rows that are decoded are filled up with the spare slot.
SIZES = (1, 2, 4, 8, 16, 24, 32)


class PlainRunner:
    """Calls the cycle."""

    def __init__(self, cycle: Cycle):
        self.cycle = cycle
        self.device = cycle.state.device
        self.watch = Stopwatch(self.device)

    def run(self, slots: Sequence[int], drawing: Drawing, width: int, watch: Stopwatch | None = None) -> Tensor:
        """One cycle of the rows in these slots, which drafts `width` tokens. Returns their records as `Cycle` does.

        If the cycle raises, the state is what it was before.
        """
        numbers = self.cycle.state.numbers
        before = numbers.clone()
        self.cycle.before(slots, width)
        try:
            records = self.cycle(torch.tensor(slots, device=self.device), drawing, width, watch or self.watch)
        except BaseException:
            numbers.copy_(before)
            raise
        self.cycle.after(slots, width)
        return records

    def size(self, rows: int) -> int:
        """The number of slots that a cycle of so many rows computes."""
        return rows

    def timed_run(self, slots: Sequence[int], drawing: Drawing, width: int) -> tuple[Tensor, float, float]:
        """As `run`, and also returns the seconds that the cycle took, and those that passed while it drafted.

        It waits for the device. On a CPU the seconds are those of the processor in this thread, so that other work on
        the machine does not count.
        """
        clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        watch = Stopwatch(self.device)
        self._wait()
        start = clock()
        records = self.run(slots, drawing, width, watch)
        self._wait()
        seconds = clock() - start
        self.watch.marks += watch.marks
        phases = watch.lap()
        return records, seconds, seconds * phases["draft"] / sum(phases.values())

    def reset(self) -> None:
        """Forgets what depends on the tensors of the state."""

    def seconds(self) -> dict[str, float]:
        """The seconds of the phases of cycles ("draft", "verify", "commit") since the last call."""
        return self.watch.lap()

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
    """Replays a CUDA graph of the cycle, captured at its first use for each number of rows, width and way of drawing.

    Args:
        sizes: the numbers of slots of a graph, ascending; the last one is that of all slots.
    """

    def __init__(self, cycle: Cycle, sizes: Sequence[int]):
        super().__init__(cycle)
        self.sizes = sizes
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[int, Drawing, int], Graph] = {}

    def run(self, slots: Sequence[int], drawing: Drawing, width: int) -> Tensor:
        captured = self._graph(len(slots), drawing, width)
        filled = [*slots, *[self.cycle.state.spare] * (len(captured.slots) - len(slots))]
        if captured.shown != filled:
            captured.slots.copy_(torch.tensor(filled), non_blocking=True)
            captured.shown = filled
        self.cycle.before(slots, width)
        captured.graph.replay()
        self.cycle.after(slots, width)
        captured.replays += 1
        return captured.records[: len(slots)]

    def timed_run(self, slots: Sequence[int], drawing: Drawing, width: int) -> tuple[Tensor, float, float]:
        """As that of `PlainRunner`, but by the GPU's clock, so that the host's time does not count."""
        records = self.run(slots, drawing, width)
        phases = self._graph(len(slots), drawing, width).watch.lap()
        return records, sum(phases.values()), phases["draft"]

    def size(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

    def reset(self) -> None:
        self.graphs.clear()

    def seconds(self) -> dict[str, float]:
        """All replays of a graph are taken to be as long as its last one."""
        total: dict[str, float] = defaultdict(float)
        for captured in self.graphs.values():
            if captured.replays:
                for phase, seconds in captured.watch.lap().items():
                    total[phase] += seconds * captured.replays
                captured.replays = 0
        return total

    def _graph(self, rows: int, drawing: Drawing, width: int) -> Graph:
        key = self.size(rows), drawing, width
        if key not in self.graphs:
            self.graphs[key] = self._capture(*key)
        return self.graphs[key]

    def _capture(self, size: int, drawing: Drawing, width: int) -> Graph:
        """Only the spare slot is decoded while a graph is made, so that no row changes."""
        slots = torch.full((size,), self.cycle.state.spare, device=self.device)
        stream = warm_up_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.cycle(slots, drawing, width, Stopwatch(self.device))
            with _waiting_raises():  # which would spoil a capture, together with the process's CUDA state
                self.cycle(slots, drawing, width, Stopwatch(self.device))
        torch.cuda.current_stream().wait_stream(stream)
        graph, watch = torch.cuda.CUDAGraph(), Stopwatch(self.device, captured=True)
        with capture(graph, pool=self.pool):
            records = self.cycle(slots, drawing, width, watch)
        return Graph(graph, slots, records, watch, shown=[])


@contextmanager
def _waiting_raises() -> Iterator[None]:
    """Within it, an operator that waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def runner(cycle: Cycle) -> PlainRunner:
    """The runner for the devices and the dtype of the target.

    Whether a model's own modules can be captured, a first graph of one row finds out. A graph is of one device.
    """
    target = cycle.target.target
    halves = target.dtype in (torch.bfloat16, torch.float16)
    if cycle.state.device.type != "cuda" or not halves or target.is_spread:
        return PlainRunner(cycle)
    most = cycle.state.spare
    graphs = GraphRunner(cycle, [*(size for size in SIZES if size < most), most])
    if isinstance(cycle.target, ModuleForward):
        try:
            cycle.target.lengthen_tables()
            graphs.run([cycle.state.spare], Drawing(), cycle.width)
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
