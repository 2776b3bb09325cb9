"""The decode engine: a queue of requests, slots in which they are decoded, and the loop around the cycle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from ..checks import shown
from ..models import Target
from ..ops.backends import hopper_kernels_serve
from .arguments import (
    AUTO,
    check_prompt,
    denoising,
    draft_width,
    per_prompt,
    positive,
    seed_of,
    stop_ids,
    stop_texts,
    token_bias,
)
from .auto import Auto
from .completion import Completion, Decoded
from .drawing import Drawing
from .faults import detached
from .graphs import runner
from .kinds import Drafter, loaded, make_cycle
from .prefill import TOKENS, prefill, wave
from .request import Request
from .state import State
from .stopwatch import Stopwatch
from .text import Text

SLOTS_A_WAVE = 32  # where requests wait, one of so many slots has to be free before some are admitted
BEFORE_DRAFTED = 4  # the numbers of a cycle's record that stand before the drafted tokens
TOKENS_A_SLOT = 8  # tokens that are read at a time, by the number of slots


# Of some requests: records, and what takes note of the time.
Work = Callable[[list[Request]], tuple[Tensor, Callable[[], None] | None]]


@dataclass
class Record:
    """What the device says of some requests. On a GPU the host reads it while the next cycle runs.

    add_cost: what takes note of the cycle's time, which can be read when the record can.
    """

    requests: list[Request]
    values: Tensor
    is_prefill: bool
    add_cost: Callable[[], None] | None = None
    ready: torch.cuda.Event | None = None

    @classmethod
    def of(
        cls, requests: list[Request], values: Tensor, add_cost: Callable[[], None] | None, *, is_prefill: bool
    ) -> Record:
        if not values.is_cuda:
            return cls(requests, values, is_prefill, add_cost)
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(requests, copy, is_prefill, add_cost, ready)

    def read(self) -> list:
        if self.ready is not None:
            self.ready.synchronize()
        if self.add_cost is not None:
            self.add_cost()
        return self.values.tolist()


class Engine:
    """Decodes requests that may come and go at any time.

    Args:
        target: the verifier; with a DFlash drafter, tapped at the drafter's `target_layer_ids`.
        drafter: one of either kind, or its folder. None decodes plainly, one token per pass.
        slots: the number of requests that are decoded at a time. Others wait.
        max_length: the largest number of tokens of a request, prompt and answer together. The caches have room for it
            in every slot.
        block_size: slots of a drafted block, anchor included. The default is the drafter's own number, which is the
            largest of a DFlash drafter; a LoRA drafter and a denoiser take up to 64.
            "auto" chooses anew before each cycle, from what was accepted so far and from what cycles cost here
            (`decode.auto`). It may also choose to draft nothing.
        costs: with "auto", what cycles cost, as `engine.costs.tables()` of an earlier engine: seconds by the number of
            rows and by that of drafted tokens. In the place of no rows may stand those in which the drafter reads what
            plain cycles have left, by the number of tokens. By default all are measured. With a table, a seed repeats
            an answer.
        denoising_steps: 1 to 3 forwards of the drafter fill a block, from left to right. Each sees what the ones before
            it have drafted.
        greedy_draft: the draft is the likeliest one also at a temperature above 0. Such a token x is accepted with the
            probability that the target gives it, and what replaces it is drawn from the target's other tokens.
        forwards: of a cycle with a gated LoRA drafter. 1 verifies a draft and makes the next one in the same forward,
            which has a group of mask rows behind every row that it verifies; 2 drafts first, and then knows one token
            more. The default is 1 on a GPU, if all slots together have few rows (`decode.kinds`), and else 2.
        groups: of a cycle of one forward, for which they ask on any device: how many places at which a draft may end,
            from the first on, have a group behind them. A row whose draft ends at another place drafts nothing in its
            next cycle. By default all have one if all slots together then have few rows, and else the first alone.
        exact: greedy tokens depend on the prompt alone, to the bit, also in bfloat16 or float16 on a GPU (Hopper): not
            on the drafter, on what it drafts, or on other requests. On a CPU that is so without this option.
        tokenizer: a tokenizer of transformers, from which completions get their text. Stop strings need it.

    A fault stays with its request: what a callback or the tokenizer raises, memory that does not suffice for this
    request alone, or logits that are not finite. Its completion then has the finish_reason "error" and the `error`.

    An engine is not thread-safe: one thread submits, steps and cancels.

    Raises:
        ValueError: a number is out of range, the drafter cannot fill the block or was made for another target, or the
            target has no exact mode.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | str | PathLike | None = None,
        *,
        slots: int = 8,
        max_length: int = 4096,
        block_size: int | str | None = None,
        costs: Mapping[int, Mapping[int, float]] | None = None,
        denoising_steps: int = 1,
        greedy_draft: bool = False,
        forwards: int | None = None,
        groups: int | None = None,
        exact: bool = False,
        tokenizer=None,
    ):
        slots = positive("slots", slots, "row is decoded at a time")
        max_length = positive("max_length", max_length, "token has to fit")
        target.check_length(max_length, f"rows of {max_length} tokens")
        halves = target.dtype in (torch.bfloat16, torch.float16)
        if exact and target.device.type == "cuda" and not (halves and hopper_kernels_serve(target.device)):
            raise ValueError(f"exact=True on a GPU needs Hopper and bfloat16 or float16; the target is {target.dtype}")
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise TypeError(f"decode: tokenizer is {shown(tokenizer)}; a tokenizer of transformers is needed")
        if costs is not None and block_size != AUTO:
            raise ValueError('costs are for block_size="auto", which chooses by them')
        drafter = loaded(drafter, target)
        width = draft_width(target, drafter, None if block_size == AUTO else block_size)
        drafting = {"forwards": forwards, "groups": groups, "steps": denoising(denoising_steps), "greedy": greedy_draft}
        drafting["lazy"] = block_size == AUTO
        self.target, self.max_length, self.tokenizer = target, max_length, tokenizer
        self.watch = Stopwatch(target.device)
        self.state = State(slots, target.vocab_size, target.device)
        sizes = {"slots": slots + 1, "max_length": max_length, "width": width}
        with torch.no_grad():
            self.cycle = make_cycle(self.state, target, drafter, **sizes, **drafting, exact=exact)
            self.runner = runner(self.cycle)
        self.auto = Auto(self.cycle, self.runner, costs) if block_size == AUTO and width else None
        self.costs = self.auto.costs if self.auto else None
        self.waiting: deque[Request] = deque()
        self.rows: dict[int, Request] = {}  # by slot, in the order of admission
        self.free = list(range(slots))
        # Many slots become free one by one. A prefill for several of them takes little more time than one for one.
        self.least, self.most_read = max(1, slots // SLOTS_A_WAVE), max(TOKENS, TOKENS_A_SLOT * slots)
        self.records: deque[Record] = deque()
        self.most: dict[bool, int] = {}  # the rows of a prefill (True) or cycle that memory sufficed for, if it ran out
        self.fault: BaseException | None = None  # the first one since `run` began
        self.is_stepping = False
        self.cycles = 0

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        stop_token_ids: int | Iterable[int] | None = None,
        stop_strings: str | Iterable[str] | None = None,
        seed: int = 0,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        on_finish: Callable[[Completion], None] | None = None,
    ) -> Request:
        """Puts a prompt (token ids) into the queue. The options are those of `decode`.

        A callback may submit and cancel requests. `on_finish` is called for requests that failed, too.

        Raises:
            ValueError: the prompt is empty, too long or outside of the vocabulary, or a number is out of range.
            TypeError: a number is of another type.
        """
        max_new_tokens = positive("max_new_tokens", max_new_tokens, "token is decoded")
        prompt = check_prompt(self.target, prompt)
        if len(prompt) + max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit: "
                f"the engine was made for {self.max_length} tokens"
            )
        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }
        options = {name: per_prompt(name, value, 1)[0] for name, value in given.items()}
        stops = stop_ids(stop_token_ids)
        strings = stop_texts(stop_strings, self.tokenizer)
        if on_text is not None and self.tokenizer is None:
            raise ValueError("decode: on_text needs a tokenizer, by which tokens become text")
        text = None if self.tokenizer is None else Text(self.tokenizer, strings)
        seed = seed_of(seed)
        bias = token_bias(self.target, logit_bias)
        request = Request(prompt, max_new_tokens, options, bias, stops, seed, text, on_tokens, on_text, on_finish)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request with what it has. Its finish_reason is "cancelled"; nothing is called back.

        Raises ValueError for a request of another engine.
        """
        self._check_own(request)
        if request.done:
            return
        request.end("cancelled")
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def stream(self, request: Request) -> Iterator[list[int]]:
        """Steps the engine until the request ends, and yields its new tokens as they are committed.

        Raises the error of a request that failed, and ValueError for a request of another engine.
        """
        self._check_own(request)
        seen = 0
        while True:
            tokens = request.completion.tokens
            if len(tokens) > seen:
                yield tokens[seen:]
                seen += len(tokens[seen:])
            elif request.completion.error is not None:
                raise request.completion.error
            elif request.done:
                return
            else:
                self.step()

    def run(self) -> None:
        """Steps until every request has ended. Then raises the first fault of a request, if there was one.

        Raises RuntimeError within a callback.
        """
        self._check_is_outside()
        self.fault = None
        while self.step():
            pass
        if self.fault is not None:
            raise self.fault

    @torch.no_grad()
    def step(self) -> bool:
        """Admits waiting requests, runs a cycle, and reads what an earlier one has committed.

        Returns whether there is more to do.

        Raises no fault of a request. An interrupt (such as Ctrl-C) in a callback is raised after all tokens have been
        handed out. Raises RuntimeError within a callback.
        """
        self._check_is_outside()
        self.is_stepping = True
        try:
            return self._step()
        finally:
            self.is_stepping = False

    def _step(self) -> bool:
        if self.waiting and len(self.free) >= min(len(self.waiting), self.least):
            self._admit(wave(self.waiting, len(self.free), self.most_read))
        self._read_but(self.runner.lag)
        if self.rows:
            self._together(list(self.rows.values()), self._cycle, is_prefill=False)
        # On a GPU the host reads one record behind or more, so that the device never waits for it.
        self._read_but(self.runner.lag if self.rows else 0)
        goes_on = bool(self.waiting or self.rows or self.records)
        if self.auto is not None and not goes_on:
            self.auto.pace.rest()
        return goes_on

    def _together(self, requests: list[Request], work: Work, *, is_prefill: bool) -> None:
        """Does `work` for these requests, in the models' own dtypes, and keeps its record.

        If it fails, it is done for each half of them, which takes less memory. So a request ends only by what it raises
        alone. After a lack of memory, later work is done for as many requests at a time as did fit, until the engine
        has been empty.
        """
        most = self.most.get(is_prefill, len(requests))
        parts = deque(requests[first : first + most] for first in range(0, len(requests), most))
        lacks_memory, fitted = False, 1
        while parts:
            part = parts.popleft()
            try:
                with torch.autocast(self.state.device.type, enabled=False):
                    values, add_cost = work(part)
            except Exception as error:
                lacks_memory |= len(part) > 1 and isinstance(error, torch.OutOfMemoryError)
                fault = detached(error)
            else:
                self.records.append(Record.of(part, values, add_cost, is_prefill=is_prefill))
                fitted = max(fitted, len(part))
                continue
            if len(part) == 1:
                self._fail(part[0], fault)
            else:
                half = len(part) // 2
                parts.extendleft((part[half:], part[:half]))
        if lacks_memory:
            self.most[is_prefill] = fitted

    def _admit(self, requests: list[Request]) -> None:
        for request in requests:
            self.waiting.popleft()
            request.slot = self.free.pop(0)
            self.rows[request.slot] = request
        self._together(requests, self._prefill, is_prefill=True)

    def _prefill(self, requests: list[Request]) -> tuple[Tensor, None]:
        if self.state.widen_stops(max(len(request.stops) for request in requests)):
            self.runner.reset()
        slots = torch.tensor([request.slot for request in requests]).to(self.state.device, non_blocking=True)
        self.state.admit(
            slots,
            start=[len(request.prompt) for request in requests],
            last=[len(request.prompt) + request.max_new_tokens - 2 for request in requests],
            seed=[request.seed for request in requests],
            options=[request.options for request in requests],
            stops=[sorted(request.stops) for request in requests],
            bias=[request.bias for request in requests],
        )
        self.watch.start("prefill")
        first = prefill(self.cycle, requests, Drawing.of(requests))
        self.watch.stop()
        return first, None

    def _cycle(self, requests: list[Request]) -> tuple[Tensor, Callable[[], None] | None]:
        drawing = Drawing.of(requests)
        if self.auto is not None:
            return self.auto.run(requests, drawing, others_wait=bool(self.waiting))
        slots, left = [request.slot for request in requests], max(request.left for request in requests)
        size, width = self.runner.plan(len(slots), drawing, self.cycle.width, self.cycle.width, left)
        return self.runner.run(slots, drawing, width, size), None

    def _read_but(self, count: int) -> None:
        """Reads all records but the last `count`."""
        while len(self.records) > count:
            self._read(self.records.popleft())

    def _read(self, record: Record) -> None:
        values = record.read()
        if not record.is_prefill:
            self.cycles += any(row[0] for row in values)
            if self.auto is not None and len(values[0]) > BEFORE_DRAFTED:
                pairs = zip(record.requests, values, strict=True)
                read = [(request, *row[1:3]) for request, row in pairs if row[0] and row[3] >= 0]
                self.auto.observe(read, others_wait=bool(self.waiting))
        interrupt = None
        for request, row in zip(record.requests, values, strict=True):
            if request.done:
                continue
            try:
                self._commit(request, row, record.is_prefill)
            except BaseException as fault:
                self._fail(request, detached(fault))
                interrupt = interrupt if isinstance(fault, Exception) else fault
            if request.done:
                self._release(request)
        if interrupt is not None:
            raise interrupt

    def _commit(self, request: Request, row, is_prefill: bool) -> None:
        _, verified, accepted, token, *drafted = (True, 0, 0, row) if is_prefill else row
        if token < 0:
            raise FloatingPointError(f"the target's logits are not finite after {request.decoded} decoded tokens")
        if is_prefill:
            request.commit([token])
        else:
            request.commit_cycle(drafted[:verified], accepted, token)

    def _fail(self, request: Request, fault: BaseException) -> None:
        """Ends a request that has raised."""
        self.fault = self.fault or fault
        request.end("error", fault)
        self._release(request)
        try:
            request.finish()
        except Exception as another:
            another.__context__ = fault
            request.completion.error = detached(another)

    def _check_is_outside(self) -> None:
        if self.is_stepping:
            raise RuntimeError("an engine's callbacks may submit and cancel requests, but not step, run or stream")

    def _check_own(self, request: Request) -> None:
        if not isinstance(request, Request):
            raise TypeError(f"Engine: a request is {shown(request)}; what submit has returned is needed")
        if not (request.done or request in self.waiting or self.rows.get(request.slot) is request):
            raise ValueError("the request was submitted to another engine")

    def _release(self, request: Request) -> None:
        """Gives the slot of a request that has ended to others. Until then nothing writes to it."""
        if self.rows.get(request.slot) is not request:
            return
        del self.rows[request.slot]
        self.free.append(request.slot)
        if not self.rows:
            self.most.clear()
        self.state.freeze(request.slot)
        if request.completion.finish_reason in ("error", "cancelled"):
            self.cycle.clear(request.slot)  # what such a row leaves there may not be finite

    def add_times(self, decoded: Decoded) -> None:
        """Adds the cycles, and the seconds of each phase, since the last call."""
        seconds = self.runner.seconds()
        decoded.cycles += self.cycles
        decoded.costs = self.costs.tables() if self.costs else {}
        decoded.prefill_seconds += self.watch.lap().get("prefill", 0.0)
        decoded.draft_seconds += seconds.get("draft", 0.0)
        decoded.verify_seconds += seconds.get("verify", 0.0)
        decoded.commit_seconds += seconds.get("commit", 0.0)
        self.cycles = 0
