"""Reads prompts into the caches, several at a time and in chunks, and draws the first token of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import count_tokens_
from ..ops.cycle import begin_cycle
from .cycle import Cycle
from .drawing import Drawing, draw
from .request import Request

CHUNK = 256  # tokens of a row that are read at a time
TOKENS = 2048  # tokens of all rows that are read at a time


def wave(waiting: Sequence[Request], free: int) -> list[Request]:
    """The requests from the head of the queue that are read together."""
    rows = [request for request, _ in zip(waiting, range(free), strict=False)]
    longest = 0
    for count, request in enumerate(rows):
        longest = max(longest, min(CHUNK, len(request.prompt)))
        if count and longest * (count + 1) > TOKENS:
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
    last = tokens.new_zeros(len(requests), cycle.target.target.hidden_size, dtype=cycle.target.cache.keys.dtype)
    for first in range(0, longest, chunk):
        part = tokens[:, first : first + chunk]
        counts = (rows.start - first).clamp(0, part.shape[1])
        column = torch.arange(part.shape[1], device=state.device)
        positions = torch.where(column < counts[:, None], first + column, -1)
        begin = torch.full_like(rows.start, first)
        hidden, features = cycle.target.hidden(part, positions, begin, counts, rows.slots, cycle.taps)
        if cycle.draft is not None:
            cycle.draft.inject(features, positions, rows.slots)
        # The output of a row's last token, if it is in this chunk.
        at = rows.start - 1 - first
        here = (at >= 0) & (at < part.shape[1])
        ends = hidden.gather(1, at.clamp(0, part.shape[1] - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        last = torch.where(here[:, None], ends, last)
    filters, changes = state.options_of(slots, drawing.filters), state.changes_of(slots, drawing.changes)
    if "token_counts" in changes:
        state.counts[slots] = 0
        count_tokens_(state.counts, tokens, lens=rows.start, table_rows=slots, prompt=True)
    logits = cycle.target.logits(last)
    anchors = draw(logits[:, None], rows.seed, rows.start, filters, changes)[0][:, 0]
    if "token_counts" in changes:
        count_tokens_(state.counts, anchors[:, None], table_rows=slots)
    finite = logits.gather(1, anchors[:, None])[:, 0].isfinite()
    stopped = (anchors[:, None] == state.stops.index_select(0, slots)).any(1)
    state.set_anchors(slots, anchors, finite & ~stopped & (rows.start <= rows.last))
    return anchors.where(finite, -1)
