"""Decodes prompts canvas by canvas: noise, denoising steps, stop, commit, and the next canvas."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from ..prefill import CHUNK, wave
from ..request import Request
from .completion import CanvasDecoded, Step
from .cycle import CanvasCycle
from .graphs import Runner


class CanvasLoop:
    """The rows that are decoded at a time, and the queue of those that wait.

    Each row commits its canvas when that is done, and begins the next one, whatever the other rows do.

    Args:
        tracing: keeps each step in the completions.
        together: a batch commits when all of its canvases are done, and its finished rows go on until all rows are
            finished, as in transformers. All requests must have slots.
        pad: with `together`, the token that finished rows have behind their end; None keeps their tokens.
    """

    def __init__(self, cycle: CanvasCycle, *, tracing: bool = False, together: bool = False, pad: int | None = None):
        self.cycle, self.tracing, self.together, self.pad = cycle, tracing, together, pad
        self.run = Runner(cycle)
        self.rows: dict[int, Request] = {}  # by slot
        self.free = list(range(cycle.spare))
        self.steps: dict[int, int] = {}  # of each slot's canvas
        self.least: dict[int, int] = {}  # the steps before which it cannot be done
        self.decoded = CanvasDecoded([])

    def decode(self, requests: Iterable[Request], canvases: Sequence[Sequence[int] | None]) -> CanvasDecoded:
        """Decodes requests; `canvases` has the first canvas of those that do not begin with noise."""
        requests = list(requests)
        given = {id(request): canvas for request, canvas in zip(requests, canvases, strict=True)}
        waiting = deque(requests)
        begin = time.perf_counter()
        while waiting or self.rows:
            if waiting and self.free:
                self._admit(waiting, given)
            self._step()
        self.decoded.completions = [request.completion for request in requests]
        self.decoded.capture_seconds = self.run.capture_seconds
        spent = self.decoded.prefill_seconds + self.decoded.capture_seconds
        self.decoded.decode_seconds = time.perf_counter() - begin - spent
        return self.decoded

    def _admit(self, waiting: deque[Request], given: dict[int, Sequence[int] | None]) -> None:
        """Reads the prompts of waiting requests, as many as fit, and begins their canvases."""
        start = time.perf_counter()
        while waiting and self.free:
            requests = wave(waiting, len(self.free)) if not self.together else list(waiting)
            for request in requests:
                waiting.popleft()
                request.slot = self.free.pop(0)
                self.rows[request.slot] = request
            self._read(requests)
            self._begin(requests, [given[id(request)] for request in requests])
        if self.cycle.device.type == "cuda":
            torch.cuda.synchronize(self.cycle.device)
        self.decoded.prefill_seconds += time.perf_counter() - start

    def _read(self, requests: list[Request]) -> None:
        """Reads prompts into the cache, in chunks."""
        device = self.cycle.device
        slots = torch.tensor([request.slot for request in requests], dtype=torch.int32, device=device)
        lengths = torch.tensor([len(request.prompt) for request in requests], device=device)
        longest = max(len(request.prompt) for request in requests)
        padded = [[*request.prompt, *[0] * (longest - len(request.prompt))] for request in requests]
        tokens = torch.tensor(padded, device=device)
        chunk = min(CHUNK, longest)
        for first in range(0, longest, chunk):
            part = tokens[:, first : first + chunk]
            counts = (lengths - first).clamp(0, part.shape[1])
            column = torch.arange(part.shape[1], device=device)
            positions = torch.where(column < counts[:, None], first + column, -1)
            self.cycle.forward.encode(part, positions, torch.full_like(lengths, first), counts, slots)

    def _begin(self, requests: list[Request], canvases: list[Sequence[int] | None]) -> None:
        cycle, device = self.cycle, self.cycle.device

        def column(numbers: list[int]) -> torch.Tensor:
            return torch.tensor(numbers, device=device)

        has_canvas = [canvas is not None for canvas in canvases]
        for kind in sorted(set(has_canvas)):  # with noise, and with a canvas of their own
            chosen = [index for index, has in enumerate(has_canvas) if has == kind]
            rows = [requests[index] for index in chosen]
            tokens = [list(canvases[index]) for index in chosen] if kind else None
            lengths = [len(row) for row in tokens] if kind else [cycle.length] * len(rows)
            padded = column([[*row, *[0] * (cycle.length - len(row))] for row in tokens]) if kind else None
            slots = column([row.slot for row in rows])
            start, seed = column([len(row.prompt) for row in rows]), column([row.seed for row in rows])
            cycle.admit(slots, start, seed, padded, column(lengths))
            for at, row in enumerate(rows):
                masked = tokens[at].count(cycle.forward.mask_id) if kind else cycle.length
                self._count(row, masked)

    def _count(self, request: Request, masked: int) -> None:
        self.steps[request.slot], self.least[request.slot] = 0, self.cycle.process.steps_before_end(masked)
        if self.tracing:
            request.completion.canvases.append([])

    def _step(self) -> None:
        slots = list(self.rows)
        self.run("step", slots)
        self.decoded.steps += 1
        for slot in slots:
            self.steps[slot] += 1
        if self.tracing:
            self._trace(slots)
        # Reading the flags waits for the device, so that is not done while no canvas can be finished.
        if any(self.steps[slot] >= self.least[slot] for slot in slots):
            rows = self.cycle.rows
            where = torch.tensor(slots, device=self.cycle.device)
            flags = torch.stack([rows.running[where], rows.finite[where], rows.step[where]]).tolist()
            done = [slot for slot, running in zip(slots, flags[0], strict=True) if not running]
            if done and (not self.together or len(done) == len(slots)):
                finite, steps = (dict(zip(slots, values, strict=True)) for values in flags[1:])
                self._finish(done, finite, steps)

    def _finish(self, slots: list[int], finite: dict[int, bool], steps: dict[int, int]) -> None:
        """Takes the tokens of canvases that are done. Rows that are not finished go on with the next canvas."""
        best = self.cycle.rows.best[torch.tensor(slots, device=self.cycle.device)].tolist()
        going, kept = [], []
        for slot, tokens in zip(slots, best, strict=True):
            request, before = self.rows[slot], self.rows[slot].decoded
            if not request.done:
                request.completion.steps.append(steps[slot])
                self._commit(request, tokens, finite[slot])
            if not request.done:
                going.append(slot)
            elif self.pad is not None:
                end = request.decoded - before
                tokens[end:] = [self.pad] * (len(tokens) - end)
            kept.append(tokens)
        if self.together and going:
            where = torch.tensor(slots, device=self.cycle.device)
            self.cycle.rows.best[where] = torch.tensor(kept, device=self.cycle.device)
            going = slots
        for slot in set(slots) - set(going):
            del self.rows[slot], self.steps[slot], self.least[slot]
            self.free.append(slot)
        if going:
            self.run("extend", going)
            for slot in going:
                self._count(self.rows[slot], self.cycle.length)

    def _commit(self, request: Request, tokens: list[int], finite: bool) -> None:
        if not finite:
            request.end("error", ValueError("the model's logits were not finite"))
            return
        request.commit(tokens[: request.max_new_tokens - request.decoded])

    def _trace(self, slots: list[int]) -> None:
        rows = self.cycle.rows.take(torch.tensor(slots, device=self.cycle.device))
        read = (x.tolist() for x in (rows.canvas, rows.accepted, rows.best, rows.length, rows.step))
        for slot, canvas, accepted, best, length, step in zip(slots, *read, strict=True):
            steps = self.rows[slot].completion.canvases[-1]
            if step > len(steps):  # the canvas was not done before
                steps.append(Step(canvas[:length], accepted[:length], best[:length]))
