"""A device that decodes nothing: it has times, by which the choices of "auto" are judged."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch

from dflash_ext.decode.auto import Auto
from dflash_ext.decode.cycle import Cycle
from dflash_ext.decode.drafts.backlog import MOST, Backlog, UnreadTokens
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
        host: what the host takes for a cycle. reading: what it takes to read what came of it.
        making: what it takes more for a plain call on a GPU, and for a graph.
        late: what the host takes to have a drafter read what plain cycles have left for it.
        token: what the device takes for each token of that.
        noise: the largest share by which a measurement is too long.
    """

    def __init__(
        self,
        times: Times,
        *,
        host: float = 0.0,
        reading: float = 0.0,
        making: float = 0.0,
        late: float = 0.0,
        token: float = 0.0,
        noise: float = 0.25,
        seed: int = 0,
    ):
        self.times, self.each, self.reading, self.making = times, host, reading, making
        self.late, self.token = late, token
        self.chance, self.noise = random.Random(seed), noise
        self.host, self.free, self.ends = 0.0, 0.0, deque([0.0])

    def queue(self, rows: int, width: int, *, made: bool = True) -> float:
        """Adds a cycle to the queue, and returns how long it takes."""
        self.host += self.each + (0.0 if made else self.making)
        taken = time_of(self.times, rows, width)
        self.free = max(self.free, self.host) + taken
        self.ends.append(self.free)
        return taken

    def catch_up(self, tokens: int) -> float:
        """Has a drafter read so many tokens. Returns the time from where the device is free until it has read them."""
        begin = max(self.free, self.host)
        self.host += self.late
        self.free = max(self.free, self.host) + tokens * self.token
        return self.free - begin

    def wait(self, behind: int) -> None:
        """The host waits for the cycle that is so many behind the last one, and reads what came of it."""
        self.host = max(self.host, self.ends[-1 - behind]) + self.reading

    def drafting(self, rows: int, width: int) -> float:
        """What a draft of one token takes more than none, without what a token more takes in longer drafts."""
        none, one, most = (time_of(self.times, rows, each) for each in (0, 1, 15))
        return max(one - none - (most - one) / 14, 0.0) if width else 0.0

    def measured(self, taken: float, drafting: float = 0.0) -> tuple[float, float]:
        """What a clock says of these times."""
        slower = self.chance.uniform(1, 1 + self.noise)
        return slower * taken, slower * drafting


class Drafted(Cycle):
    """A cycle of 15 drafted tokens at most, which only knows what waits for the drafter: features, or tokens."""

    def __init__(self, clock: Clock, slots: int, *, reads_tokens: bool = False):
        self.clock, self.width = clock, 15
        self.state = SimpleNamespace(device=torch.device("cpu"))
        backlog = (
            UnreadTokens(slots, 4096, self.width + 1, self.state.device)
            if reads_tokens
            else Backlog(slots, MOST, 1, dtype=torch.float32, device=self.state.device)
        )
        self.draft = SimpleNamespace(backlog=backlog)

    def before(self, slots, width) -> float:
        """Returns how long it takes."""
        unread = self.unread(slots, width)
        if not unread:
            return 0.0
        self.draft.backlog.forget(slots)
        return self.clock.catch_up(unread)


class Timed:
    """How both runners measure what takes place before a cycle."""

    def timed_catch_up(self, slots, width):
        taken = self.cycle.before(slots, width)
        return lambda: self.clock.measured(taken)[0]


class Plain(Timed, PlainRunner):
    """A CPU."""

    def __init__(self, clock: Clock, slots: int, *, reads_tokens: bool = False):
        super().__init__(Drafted(clock, slots, reads_tokens=reads_tokens))
        self.clock = clock

    def run(self, slots, drawing, width, size=None):
        self.cycle.before(slots, width)
        self.clock.queue(len(slots), width)
        self.cycle.after(slots, width)
        return width

    def timed_run(self, slots, drawing, width, size=None):
        times = time_of(self.clock.times, len(slots), width), self.clock.drafting(len(slots), width)
        return self.run(slots, drawing, width), lambda: self.clock.measured(*times)


class Graphs(Timed, GraphRunner):
    """A GPU."""

    def __init__(self, clock: Clock, slots: int):
        super().__init__(Drafted(clock, slots), sizes_of(slots))
        self.clock, self.lag = clock, 1

    def run(self, slots, drawing, width, size=None):
        self.cycle.before(slots, width)
        key = size, drawing, width
        made = key in self.graphs
        self.graphs[key] = None
        self.clock.queue(size, width, made=made)
        self.cycle.after(slots, width)
        return width

    def timed_run(self, slots, drawing, width, size=None):
        records = self.run(slots, drawing, width, size)
        times = time_of(self.clock.times, size, width), self.clock.drafting(size, width)
        return records, lambda: self.clock.measured(*times)


def requests_of(rows: int, tokens: int) -> list[Request]:
    return [Request([3], tokens, {}, {}, frozenset(), 0, slot=slot, decoded=1) for slot in range(rows)]


def decode(
    auto: Auto | None, runner: PlainRunner, requests: Sequence[Request], rates: Sequence[float], seed: int
) -> float:
    """Decodes requests whose drafted tokens are accepted with these probabilities. Returns the time.

    It does what the engine does: the host reads records when the runner lets it be so far behind. Without `auto` there
    is no drafter.
    """
    chance, drawing, clock, unread = random.Random(seed), Drawing(), runner.clock, deque()
    if auto is None:
        runner.cycle.draft = None
    else:
        runner.cycle.draft.backlog.forget([request.slot for request in requests])
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
