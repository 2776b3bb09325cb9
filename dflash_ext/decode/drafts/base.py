"""What the engine knows of a drafter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models import Target
from ...ops.cycle import CycleRows, begin_cycle
from ..drawing import draw
from ..kv_cache import KVCache
from .backlog import CHUNK, Backlog
from .sampler import CandidateSampler


class Draft:
    """Drafts up to `width` tokens behind the anchors of rows.

    A drafter says what it keeps of tokens that were read or committed (`inject`, `commit`), and gives the logits of the
    tokens that it drafts (`denoise`). It draws the tokens from them here.

    Args:
        width: the largest number of drafted tokens in a cycle.
        steps: the number of denoising steps that fill a block.
        greedy: the draft is the likeliest one, whatever the temperature of the row.
        taps: the layers of the target whose outputs are the features.
        sampler: refines logits token by token; None draws from them as they are.

    Attributes:
        cache: the drafter's own; None if the target's serves it.
        backlog: what cycles leave for the next draft; None if nothing waits.
    """

    cache: KVCache | None = None
    backlog: Backlog | None = None

    def __init__(
        self,
        target: Target,
        *,
        width: int,
        steps: int = 1,
        greedy: bool = False,
        taps: tuple[int, ...] = (),
        sampler: CandidateSampler | None = None,
    ):
        self.target, self.width, self.steps, self.greedy = target, width, steps, greedy
        self.taps, self.sampler = taps, sampler

    def inject(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Keeps a part of a prompt: tokens int64 [B, R] at `positions` (int64 [B, R], -1: none) of the rows in `slots`
        (int32 [B]), and their features [B, R, taps * H] (None without taps)."""

    def commit(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Keeps what a cycle has committed; the arguments are those of `inject`. A plain cycle has one token a row."""
        self.inject(tokens, features, positions, slots)

    def begin(self, slots: Sequence[int], rows: CycleRows) -> None:
        """The prompts of rows, which are in these slots, have been kept."""
        if self.backlog is not None:
            self.backlog.forget(slots)
            self.backlog.mark(rows)

    def catch_up(self, slots: Sequence[int], width: int, state: Tensor) -> None:
        """Keeps what waits in slots, if the next cycle drafts (`width` is not 0) or there is no room for its tokens.

        state: the engine's numbers.
        """
        if self.backlog is None:
            return
        backlog = self.backlog
        for late in backlog.late(slots, width):
            filled = [*late, *[backlog.spare] * (backlog.filled(len(late)) - len(late))]
            known = [backlog.counts[slot] for slot in filled]
            index, counts = torch.tensor([filled, known]).to(state.device, non_blocking=True)
            rows = begin_cycle(state, index, 0, 0)
            for left in range(max(known), 0, -CHUNK):
                count, waiting = backlog.filled(min(left, CHUNK)), backlog.waiting(rows, counts)
                self.inject(*backlog.take(rows.start, waiting, rows.slots, count), rows.slots)
                backlog.mark(rows, count)
            backlog.forget(late)

    def denoise(self, rows: CycleRows, known: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """The logits [B, count, V] of the next tokens of the blocks, in the target's vocabulary and dtype.

        `rows` says how many slots there are, which `block_len` gives. `known` int64 [B, n] are the tokens of the first
        slots: the anchors, and what was drafted in earlier steps.

        Also returns the hidden states [B, count, H] behind the logits, which a sampler takes; None if there is none.
        """
        raise NotImplementedError

    def block_len(self, width: int) -> int:
        """The slots of a block that drafts `width` tokens."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """Empties a slot of what the drafter keeps."""
        for kept in (self.cache, self.backlog):
            if kept is not None:
                kept.clear(slot)

    def draft(
        self, rows: CycleRows, width: int, filters: dict[str, Tensor], changes: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The drafted tokens [B, width], and what `verify` must know of their draw.

        Every step of denoising draws the next tokens, from left to right, and sees those that were drawn before. So a
        token is drawn from logits that depend on the tokens before it alone, which is the q that `verify` needs.
        """
        steps = min(self.steps, width)
        known, parts = rows.anchor[:, None], []
        for step in range(steps):
            count = width // steps + (step < width % steps)
            logits, hidden = self.denoise(rows, known, count)
            first = rows.start + known.shape[1]
            parts.append(self.draw(logits, hidden, known[:, -1], rows.seed, first, filters, changes))
            known = torch.cat([known, parts[-1][0]], dim=1)
        return joined(parts)

    def draw(
        self,
        logits: Tensor,
        hidden: Tensor | None,
        before: Tensor,
        seed: Tensor,
        first: Tensor,
        filters: dict[str, Tensor],
        changes: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws drafted tokens from what `denoise` gives, as `drawing.draw` does.

        A greedy draft is a point mass, of which `verify` must know nothing. It follows the penalties and the bias, as
        far as the tokens before the block go. A sampled draft has none.

        Args:
            before: int64 [B], the token before the first of them.
        """
        how = ({}, changes) if self.greedy or not filters else (filters, {})
        if self.sampler is None:
            return draw(logits, seed, first, *how)
        parts, candidates = [], self.sampler.candidates(logits)
        for at in range(logits.shape[1]):
            scores = self.sampler.scores(logits[:, at], hidden[:, at], candidates[:, at], before)
            parts.append(draw(scores[:, None], seed, first + at, *how))
            before = parts[-1][0][:, 0]
        return joined(parts)


def joined(parts: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws one behind the other."""
    if len(parts) == 1:
        return parts[0]
    tokens, facts = zip(*parts, strict=True)
    return torch.cat(tokens, dim=1), {name: torch.cat([each[name] for each in facts], dim=1) for name in facts[0]}


def narrow(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head that a draft of this dtype reads. On a CPU half of the drafting time goes into reading it, and a draft
    needs no float32."""
    is_narrow = head.device.type == "cpu" and head.dtype == dtype == torch.float32
    return head.detach().bfloat16() if is_narrow else head.detach()
