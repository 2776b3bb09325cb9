"""Runs cycles: as CUDA graphs on a GPU, by plain calls elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cycle import Cycle, Drawing
from .stopwatch import Stopwatch

# A graph has one number of rows. Slots beyond the rows that are decoded are filled up with the spare slot.
SIZES = (1, 2, 4, 8, 16, 24, 32)


class PlainRunner:
    """Calls the cycle."""

    def __init__(self, cycle: Cycle, watch: Stopwatch):
        self.cycle, self.watch = cycle, watch

    def run(self, slots: Sequence[int], drawing: Drawing) -> Tensor:
        """One cycle of the rows in these slots. Returns their records as `Cycle` does."""
        return self.cycle(torch.tensor(slots, device=self.cycle.state.device), drawing, self.watch)

    def reset(self) -> None:
        """Forgets what depends on the tensors of the state."""


class GraphRunner(PlainRunner):
    """Replays a CUDA graph of the cycle, captured at its first use for each number of rows and way of drawing."""

    def __init__(self, cycle: Cycle, watch: Stopwatch):
        super().__init__(cycle, watch)
        self.pool = torch.cuda.graph_pool_handle()
        self.reset()

    def reset(self) -> None:
        self.graphs: dict[tuple[int, Drawing], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.shown: dict[int, list[int]] = {}

    def run(self, slots: Sequence[int], drawing: Drawing) -> Tensor:
        size = next((size for size in SIZES if size >= len(slots)), len(slots))
        if (size, drawing) not in self.graphs:
            self.graphs[size, drawing] = self._capture(size, drawing)
        graph, rows, records = self.graphs[size, drawing]
        filled = [*slots, *[self.cycle.state.spare] * (size - len(slots))]
        if self.shown.get(id(rows)) != filled:
            rows.copy_(torch.tensor(filled), non_blocking=True)
            self.shown[id(rows)] = filled
        self.watch.start("cycle")
        graph.replay()
        self.watch.stop()
        return records[: len(slots)]

    def _capture(self, size: int, drawing: Drawing) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Only the spare slot is decoded while a graph is made, so that no row changes."""
        rows = torch.full((size,), self.cycle.state.spare, device=self.cycle.state.device)
        silent = Stopwatch(torch.device("cpu"))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.cycle(rows, drawing, silent)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            records = self.cycle(rows, drawing, silent)
        return graph, rows, records


def runner(cycle: Cycle, watch: Stopwatch) -> PlainRunner:
    """The runner for the device and dtype of the target."""
    cache = cycle.target.cache.keys
    captured = cache.is_cuda and cache.dtype in (torch.bfloat16, torch.float16)
    return GraphRunner(cycle, watch) if captured else PlainRunner(cycle, watch)
