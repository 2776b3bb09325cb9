"""Measures the time of named phases on the device that runs them."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Stopwatch:
    """Adds up the seconds of named phases: wall time on the CPU, CUDA events on a GPU, which wait for nothing.

    Args:
        captured: the phases are those of a CUDA graph that is being captured. A replay then records the events anew,
            so that `lap` gives the seconds of the last replay.
    """

    def __init__(self, device: torch.device, *, captured: bool = False):
        self.cuda, self.captured = device.type == "cuda", captured
        self.marks: list[tuple[str, object, object]] = []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=self.captured)
        event.record()
        return event

    def start(self, phase: str) -> None:
        self.phase, self.begin = phase, self._now()

    def stop(self) -> None:
        self.marks.append((self.phase, self.begin, self._now()))

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for phase, begin, end in self.marks:
            seconds[phase] += begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
        if not self.captured:
            self.marks.clear()
        return seconds
