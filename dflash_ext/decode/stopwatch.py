"""Measures the time of named phases on the device that runs them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.cycle import mark_time

MOST_MARKS = 8  # of the clock, in a captured cycle


class Stopwatch:
    """Adds up the seconds of named phases: wall time on the CPU, CUDA events on a GPU, which wait for nothing.

    Args:
        captured: the phases are those of a CUDA graph that is being captured. A replay then reads the GPU's clock anew,
            so that `lap` gives the seconds of the last replay.
    """

    def __init__(self, device: torch.device, *, captured: bool = False):
        self.device, self.cuda, self.captured = device, device.type == "cuda", captured
        self.marks: list[tuple[str, object, object]] = []
        self.running: tuple[str, object] | None = None
        # Graphs share memory, so that one overwrites what another has left in its own. Times are kept outside.
        self.clock = torch.zeros(MOST_MARKS if captured else 0, dtype=torch.int64, device=device)
        self.times = iter(self.clock.unbind())

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        if self.captured:
            return next(self.times).copy_(mark_time(torch.empty(0, device=self.device)))
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, phase: str) -> None:
        """Begins a phase, and ends the one that is running."""
        now = self._now()
        self._end(now)
        self.running = phase, now

    def stop(self) -> None:
        """Ends the phase that is running."""
        self._end(self._now())

    def _end(self, now) -> None:
        if self.running is not None:
            self.marks.append((*self.running, now))
            self.running = None

    def last(self) -> Callable[[], dict[str, float]]:
        """What gives the seconds by phase of the last replay of a captured cycle, once the device has done what is
        queued until now."""
        copy = torch.empty(self.clock.shape, dtype=torch.int64, pin_memory=True).copy_(self.clock, non_blocking=True)
        marks = [(phase, begin.storage_offset(), end.storage_offset()) for phase, begin, end in self.marks]

        def seconds() -> dict[str, float]:
            times, total = copy.tolist(), defaultdict(float)
            for phase, begin, end in marks:
                total[phase] += (times[end] - times[begin]) / 1e9
            return total

        return seconds

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        seconds: dict[str, float] = defaultdict(float)
        for phase, begin, end in self.marks:
            seconds[phase] += _seconds(begin, end)
        if not self.captured:
            self.marks.clear()
        return seconds


def _seconds(begin, end) -> float:
    if isinstance(begin, float):
        return end - begin
    if isinstance(begin, Tensor):
        return (end - begin).item() / 1e9
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
