"""Runs the functions of the canvas loop: as CUDA graphs on a GPU, by plain calls elsewhere."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..capture import capture, warm_up
from ..graphs import sizes_of
from .cycle import CanvasCycle


class Runner:
    """Calls a function of a cycle for the rows in some slots.

    On a GPU, in bfloat16 or float16, a call is one replay of a CUDA graph, captured at the first use for each number of
    rows. What changes from call to call is in tensors of the cycle, so a graph serves prompts of any length. A model
    that reads values on the host cannot be captured. It runs by plain calls, with a warning.
    """

    def __init__(self, cycle: CanvasCycle):
        self.cycle = cycle
        self.graphs: dict[tuple[str, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.sizes = sizes_of(cycle.spare)
        halves = cycle.forward.like.dtype in (torch.bfloat16, torch.float16)
        self.capture_seconds = 0.0
        self.pool = torch.cuda.graph_pool_handle() if cycle.device.type == "cuda" and halves else None

    def __call__(self, name: str, slots: Sequence[int]) -> None:
        """Calls the cycle's function of this name."""
        function = getattr(self.cycle, name)
        size = next(size for size in self.sizes if size >= len(slots))
        if self.pool is not None and (name, size) not in self.graphs:
            start = time.perf_counter()
            try:
                self.graphs[name, size] = self._capture(function, size)
            except RuntimeError as error:
                self.pool = None
                warnings.warn(f"canvases run without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
            torch.cuda.synchronize(self.cycle.device)
            self.capture_seconds += time.perf_counter() - start
        if self.pool is None:
            function(torch.tensor(slots, device=self.cycle.device))
            return
        graph, places = self.graphs[name, size]
        filled = [*slots, *[self.cycle.spare] * (size - len(slots))]
        places.copy_(torch.tensor(filled), non_blocking=True)
        graph.replay()

    def _capture(self, function: Callable[[Tensor], None], size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Only the spare slot is computed while a graph is made, so that no row changes."""
        slots = torch.full((size,), self.cycle.spare, device=self.cycle.device)
        warm_up(lambda: function(slots), self.cycle.device)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, pool=self.pool):
            function(slots)
        return graph, slots
