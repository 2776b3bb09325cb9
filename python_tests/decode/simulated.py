"""A device that decodes nothing: it has times, by which the choices of "auto" are judged."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch

from dflash_ext.decode.auto import Auto
from dflash_ext.decode.drawing import Drawing
from dflash_ext.decode.graphs import GraphRunner, PlainRunner, sizes_of
from dflash_ext.decode.request import Request

Times = Mapping[int, Mapping[int, float]]  # of a cycle, by the numbers of rows and of drafted tokens


def time_of(times: Times, rows: int, width: int) -> float:
    """That of any number of rows, on the straight line between two that are known."""
    known = sorted(times)
    if rows <= known[0] or len(known) == 1:
        return times[known[0]][width]
    above = next((each for each in known if each >= rows), known[-1])
    below = known[known.index(above) - 1]
    share = (rows - below) / (above - below)
    return times[below][width] + (times[above][width] - times[below][width]) * share


class Clock:
    """A host that queues cycles, and a device that runs them one after another. Times are in seconds.

    Args:
        host: what the host takes for a cycle. making: what it takes more for a plain call on a GPU, and for a graph.
        noise: the largest share by which a measurement is too long.
    """

    def __init__(self, times: Times, *, host: float = 0.0, making: float = 0.0, noise: float = 0.25, seed: int = 0):
        self.times, self.each, self.making = times, host, making
        self.chance, self.noise = random.Random(seed), noise
        self.host, self.ends = 0.0, deque([0.0])

    def queue(self, rows: int, width: int, *, made: bool = True) -> float:
        """Adds a cycle to the queue, and returns how long it takes."""
        self.host += self.each + (0.0 if made else self.making)
        taken = time_of(self.times, rows, width)
        self.ends.append(max(self.ends[-1], self.host) + taken)
        return taken

    def wait(self, behind: int) -> None:
        """The host waits for the cycle that is so many behind the last one."""
        self.host = max(self.host, self.ends[-1 - behind])

    def measured(self, taken: float, width: int) -> tuple[float, float]:
        taken *= self.chance.uniform(1, 1 + self.noise)
        return taken, 0.2 * taken if width else 0.0


class Plain(PlainRunner):
    """A CPU."""

    def __init__(self, clock: Clock):
        self.clock, self.lag = clock, 0

    def run(self, slots, drawing, width, size=None):
        self.clock.queue(len(slots), width)
        return width

    def timed_run(self, slots, drawing, width, size=None):
        taken = self.clock.queue(len(slots), width)
        return width, lambda: self.clock.measured(taken, width)


class Graphs(GraphRunner):
    """A GPU."""

    def __init__(self, clock: Clock, slots: int):
        super().__init__(SimpleNamespace(state=SimpleNamespace(device=torch.device("cpu"))), sizes_of(slots))
        self.clock, self.lag = clock, 1

    def run(self, slots, drawing, width, size=None):
        key = size, drawing, width
        made = key in self.graphs
        if key in self.called:
            self.graphs[key] = None
        self.called.add(key)
        self.clock.queue(size, width, made=made)
        return width

    def timed_run(self, slots, drawing, width, size=None):
        records = self.run(slots, drawing, width, size)
        if (size, drawing, width) not in self.graphs:
            return records, None
        taken = time_of(self.clock.times, size, width)
        return records, lambda: self.clock.measured(taken, width)


def requests_of(rows: int, tokens: int) -> list[Request]:
    return [Request([3], tokens, {}, {}, frozenset(), 0, slot=slot, decoded=1) for slot in range(rows)]


def decode(
    auto: Auto | None, runner: PlainRunner, requests: Sequence[Request], rates: Sequence[float], seed: int
) -> float:
    """Decodes requests whose drafted tokens are accepted with these probabilities. Returns the time.

    It does what the engine does: the host reads records when the runner lets it be so far behind.
    """
    chance, drawing, clock, unread = random.Random(seed), Drawing(), runner.clock, deque()
    begin = clock.host
    rest = {request.slot: request.left for request in requests}  # what the device has yet to decode
    rows = list(requests)

    def read_but(count: int) -> None:
        while len(unread) > count:
            clock.wait(len(unread) - 1)
            outcomes, add_cost = unread.popleft()
            if add_cost:
                add_cost()
            if auto is not None:
                auto.observe(outcomes, others_wait=False)
            for request, _, accepted in outcomes:
                request.decoded += accepted + 1
                if not request.left:
                    rows.remove(request)

    while rows:
        if auto is None:
            size, width = runner.plan(len(rows), drawing, 0, 0, max(request.left for request in rows))
            width, add_cost = runner.run([request.slot for request in rows], drawing, 0, size), None
        else:
            width, add_cost = auto.run(rows, drawing, others_wait=False)
        outcomes = []
        for request in rows:
            left = rest[request.slot]
            if not left:  # it has ended on the device, as the host has yet to read
                continue
            verified = min(width, left - 1)
            accepted = next((n for n in range(verified) if chance.random() >= rates[request.slot]), verified)
            rest[request.slot] -= accepted + 1
            outcomes.append((request, verified, accepted))
        unread.append((outcomes, add_cost))
        read_but(runner.lag if rows else 0)
    read_but(0)
    clock.wait(0)
    if auto is not None:
        auto.pace.rest()
    return clock.host - begin
