"""Reads prompts into the caches, several at a time and in chunks, and draws the first token of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import count_tokens_
from ..ops.cycle import FIELDS, begin_cycle
from .cycle import Cycle
from .drawing import Drawing, draw
from .kv_cache import MOST_ROWS
from .request import Request
from .state import PENALTIES, State

CHUNK = MOST_ROWS  # tokens of a row that are read at a time
TOKENS = 2048  # tokens of all rows that are read at a time; an engine of many slots reads more


def wave(waiting: Sequence[Request], free: int, tokens: int = TOKENS) -> list[Request]:
    """The requests from the head of the queue that are read together: at most `free`, and about `tokens` at a time."""
    rows = [request for request, _ in zip(waiting, range(free), strict=False)]
    longest = 0
    for count, request in enumerate(rows):
        longest = max(longest, min(CHUNK, len(request.prompt)))
        if count and longest * (count + 1) > tokens:
            return rows[:count]
    return rows


def prefill(cycle: Cycle, requests: Sequence[Request], drawing: Drawing) -> Tensor:
    """Reads the prompts of requests, which are admitted to their slots, and makes the rows active.

    A chunk's features go into the drafter's context at once, so that those of a whole prompt never exist together.

    Returns int64 [B], the first token of each, -1 if its logit is not finite.
    """
    state = cycle.state
    slots = torch.tensor([request.slot for request in requests], device=state.device)
    lengths = [len(request.prompt) for request in requests]
    longest = max(lengths)
    chunk = min(CHUNK, longest)
    padded = [[*request.prompt, *[0] * (longest - n)] for request, n in zip(requests, lengths, strict=True)]
    tokens = torch.tensor(padded).to(state.device, non_blocking=True)
    rows = begin_cycle(state.numbers, slots, 0, 0)
    if has_penalties := any(name in PENALTIES for name in drawing.changes):
        state.counts[slots] = 0
        count_tokens_(state.counts, tokens, lens=rows.start, table_rows=slots, prompt=True)
    anchors = torch.full_like(rows.start, -1)
    for first in range(0, longest, chunk):
        part = tokens[:, first : first + chunk]
        counts = (rows.start - first).clamp(0, part.shape[1])
        column = torch.arange(part.shape[1], device=state.device)
        positions = torch.where(column < counts[:, None], first + column, -1)
        begin = torch.full_like(rows.start, first)
        ends = [(row, n - 1 - first) for row, n in enumerate(lengths) if first < n <= first + part.shape[1]]
        logits, features = cycle.target.read(part, positions, begin, counts, rows.slots, cycle.taps, ends)
        if cycle.draft is not None:
            cycle.draft.inject(part, features, positions, rows.slots)
        if ends:
            ended = torch.tensor([row for row, _ in ends], device=state.device)
            anchors[ended] = _first_tokens(state, slots[ended], logits, drawing)
    if has_penalties:
        count_tokens_(state.counts, anchors[:, None], table_rows=slots)
    stopped = (anchors[:, None] == state.stops.index_select(0, slots)).any(1)
    if cycle.draft is not None:
        cycle.draft.begin([request.slot for request in requests], rows)
    state.set_anchors(slots, anchors.clamp(min=0), (anchors >= 0) & ~stopped & (rows.start <= rows.last))
    cycle.begin(slots, drawing)
    return anchors


def _first_tokens(state: State, slots: Tensor, logits: Tensor, drawing: Drawing) -> Tensor:
    """The tokens int64 [B] of rows in these slots, whose prompts have the logits [B, V]; -1 if theirs is not finite."""
    numbers = state.numbers[slots]
    start, seed = numbers[:, FIELDS.index("start")], numbers[:, FIELDS.index("seed")]
    how = state.options_of(slots, drawing.filters), state.changes_of(slots, drawing.changes)
    tokens, _ = draw(logits[:, None], seed, start, *how)
    return tokens[:, 0].where(logits.gather(1, tokens)[:, 0].isfinite(), -1)
