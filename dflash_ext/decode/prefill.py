"""Reads prompts into the caches, several at a time and in chunks, and draws the first token of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

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
    lengths = [len(request.prompt) for request in requests]
    longest = max(lengths)
    chunk = min(CHUNK, longest)
    order = sorted(range(len(requests)), key=lambda row: (lengths[row] - 1) // chunk)  # by the chunk in which rows end
    padded = chain.from_iterable(
        [*request.prompt, *[0] * (longest - n)] for request, n in zip(requests, lengths, strict=True)
    )
    # All numbers go to the device in one copy, for which the host does not wait.
    given = torch.tensor([*(request.slot for request in requests), *order, *padded]).to(state.device, non_blocking=True)
    slots, ending, tokens = given.split([len(requests), len(requests), longest * len(requests)])
    tokens = tokens.view(-1, longest)
    rows = begin_cycle(state.numbers, slots, 0, 0)
    column = torch.arange(longest, device=state.device)
    positions = torch.where(column < rows.start[:, None], column, -1)
    if has_penalties := any(name in PENALTIES for name in drawing.changes):
        state.counts[slots] = 0
        count_tokens_(state.counts, tokens, lens=rows.start, table_rows=slots, prompt=True)
    anchors = torch.full_like(rows.start, -1)
    for first in range(0, longest, chunk):
        part, places = tokens[:, first : first + chunk], positions[:, first : first + chunk].contiguous()
        counts = (rows.start - first).clamp(0, part.shape[1])
        begin = torch.full_like(rows.start, first)
        ended = [row for row in order if first < lengths[row] <= first + part.shape[1]]
        ends = [(row, lengths[row] - 1 - first) for row in ended]
        logits, features = cycle.target.read(part, places, begin, counts, rows.slots, cycle.taps, ends)
        if cycle.draft is not None:
            cycle.draft.inject(part, features, places, rows.slots)
        if ended:
            index, ending = ending[: len(ended)], ending[len(ended) :]
            anchors[index] = _first_tokens(state, slots[index], logits, drawing)
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
