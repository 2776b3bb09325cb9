"""Timing on the CPU and on the GPU. All implementations of a case take turns and are timed by the same method."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds of a call: the median over its turns, and the quartiles around it."""

    ms: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, low, high)

    def row(self) -> dict:
        """The keys of a results row that describe the time."""
        return {"ms": self.ms, "quartiles_ms": [self.low, self.high]}


def cpu_turns(calls: dict[str, Call], *, seconds: float = 3.0) -> dict[str, Timing]:
    """Times each call on the CPU.

    The calls take turns, so that other work on the machine affects all of them equally. The turns go on for
    ``seconds``, and for at least five rounds. A call that takes less than a millisecond is repeated within its turn.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(1e-3 / max(_elapsed(call, 1), 1e-9)))
    samples = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 5:
        for name, call in calls.items():
            samples[name].append(1e3 * _elapsed(call, repeats[name]) / repeats[name])
        rounds += 1
    return {name: Timing.of(each) for name, each in samples.items()}


def _elapsed(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


FLUSHED_BYTES = 256 << 20  # more than any L2 cache holds
GRAPH_CALLS = 32
SHORT_MS = 0.05
LAUNCH_MS = 0.5  # a shorter call may spend its time waiting for its own launch


def gpu_turns(calls: dict[str, Call], *, rounds: int = 15, graphs: bool = True) -> dict[str, Timing]:
    """Times each call on the GPU. All of them are timed by the method that suits the fastest one.

    - Above 0.5 ms the call itself is timed, with the L2 cache flushed before it.
    - Above 50 us a CUDA graph of one call is replayed, with the L2 cache flushed before it.
    - Below 50 us a CUDA graph of 32 calls is replayed, and the time is that of one of them. Such calls must rotate
      over more than 100 MB of inputs, so that the cache does not hold them.

    graphs: False for calls that cannot be captured, such as a backward whose forward ran outside of the graph.
    """
    for call in calls.values():
        for _ in range(3):
            call()
    fastest = min(timing.ms for timing in event_turns(calls, rounds=5).values())
    if fastest > LAUNCH_MS or not graphs:
        return event_turns(calls, rounds)
    timings = graph_turns(calls, rounds=rounds)
    if min(timing.ms for timing in timings.values()) < SHORT_MS:
        return timings
    return event_turns({name: captured(call).replay for name, call in calls.items()}, rounds)


def graph_turns(calls: dict[str, Call], *, rounds: int = 15) -> dict[str, Timing]:
    """Times each call as one of 32 in a CUDA graph."""
    replays = {name: captured(call, GRAPH_CALLS).replay for name, call in calls.items()}
    timings = event_turns(replays, rounds)
    return {name: Timing(*(value / GRAPH_CALLS for value in timing)) for name, timing in timings.items()}


def captured(call: Call, repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call that has been made before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def gpu_time_in_a_row(call: Call) -> float:
    """Milliseconds of one call on the GPU right behind another one, as in a loop, where the host runs ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def event_turns(calls: dict[str, Call], rounds: int) -> dict[str, Timing]:
    # Reading leaves the cache full of clean lines. Dirty lines would have to be written back during the timed call.
    flush = torch.zeros(FLUSHED_BYTES // 4, device="cuda").sum
    events = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: Timing.of([start.elapsed_time(end) for start, end in pairs]) for name, pairs in events.items()}
