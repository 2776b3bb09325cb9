"""Plain calls in the place of CUDA graphs: the cycles are those that an engine with graphs runs, on any device."""

from __future__ import annotations

from dflash_ext.decode import Engine
from dflash_ext.decode.graphs import GraphRunner, sizes_of


class Calls(GraphRunner):
    """Takes the same decisions as a `GraphRunner`, but a graph that is made is only remembered.

    Attributes:
        lags: how far behind the host might be, cycle by cycle.
    """

    def __init__(self, cycle):
        super().__init__(cycle, sizes_of(cycle.state.spare))
        self.lag, self.lags = 1, []

    def run(self, slots, drawing, width, size=None):
        key = size or self.fitting(len(slots)), drawing, width
        self.graphs[key] = None
        self.lags.append(self.lag)
        return self._run(slots, drawing, width, key[0], self.watch)

    def timed_run(self, slots, drawing, width, size=None):
        return self.run(slots, drawing, width, size), lambda: (1e-3, 1e-4)


def with_calls(engine: Engine) -> Engine:
    """The engine, which makes plain calls from now on."""
    engine.runner = Calls(engine.cycle)
    if engine.auto is not None:
        engine.auto.runner = engine.runner
    return engine
