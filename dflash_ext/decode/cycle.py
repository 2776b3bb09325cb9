"""A cycle: from one state of the rows to the next, on the device alone.

With a drafter: draft, verify, commit. Without one: the same without a draft, which is plain decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import count_tokens_, verify
from ..ops.cycle import CycleRows, begin_cycle, end_cycle
from .draft import BlockDraft
from .drawing import Drawing, draw
from .forward import TargetForward
from .state import State
from .stopwatch import Stopwatch


class Cycle:
    """Drafts, verifies and commits once.

    Args:
        draft: None decodes plainly.
    """

    def __init__(self, state: State, target: TargetForward, draft: BlockDraft | None):
        self.state, self.target, self.draft = state, target, draft
        self.width = draft.width if draft else 0
        self.taps = target.target.tap_ids if draft else ()

    def __call__(self, slots: Tensor, drawing: Drawing, width: int, watch: Stopwatch) -> Tensor:
        """Advances the rows in these slots (int64 [B]) by one cycle that drafts `width` tokens.

        Returns the records of `end_cycle`, int64 [B, 4 + K].
        """
        state = self.state
        rows = begin_cycle(state.numbers, slots, width, self.draft.block_len(width) if self.draft else 0)
        filters, changes = state.options_of(slots, drawing.filters), state.changes_of(slots, drawing.changes)
        tokens = rows.anchor[:, None]
        drafted, drawn = tokens[:, :0], {}
        if width:
            watch.start("draft")
            drafted, drawn = self._draft(rows, width, filters, changes)
            tokens = torch.cat([tokens, drafted], dim=1)
        watch.start("verify")
        placed = rows.positions, rows.start, rows.q_len, rows.slots
        logits, features = self.target.read(tokens, *placed, self.taps)
        chance = filters and {"seed": rows.seed + rows.start} | filters
        # Drafted tokens for which the row has no room are padding for the target, and are not verified.
        result = verify(drafted, logits, draft_lens=rows.room, **chance, **drawn, **changes)
        watch.start("commit")
        records, kept = end_cycle(
            state.numbers, slots, state.stops, rows, drafted, result.accepted, result.next_token, logits
        )
        if self.draft is not None:
            self.draft.inject(features, kept, rows.slots)
        if "token_counts" in changes:  # last, because a cycle that fails is run again
            ends = result.accepted[:, None]
            committed = torch.cat([drafted, result.next_token[:, None]], dim=1)
            committed = committed.scatter(1, ends, result.next_token[:, None])
            count_tokens_(state.counts, committed, lens=(ends[:, 0] + 1) * rows.active, table_rows=slots)
        watch.stop()
        return records

    def clear(self, slot: int) -> None:
        """Empties a slot of the caches."""
        self.target.cache.clear(slot)
        if self.draft is not None:
            self.draft.cache.clear(slot)

    def _draft(
        self, rows: CycleRows, width: int, filters: dict[str, Tensor], changes: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The drafted tokens [B, K], and what `verify` must know of their draw.

        Every step of denoising draws the next tokens, from left to right, and sees those that were drawn before. So a
        token is drawn from logits that depend on the tokens before it alone, which is the q that `verify` needs. A
        greedy draft is a point mass, which needs none. It follows the penalties and the bias, as far as the tokens
        before the block go.
        """
        how = ({}, changes) if self.draft.greedy or not filters else (filters, {})
        known, parts, facts = rows.anchor[:, None], [], []
        for count in self.draft.shares(width):
            logits = self.draft.denoise(rows, known, count)
            drafted, drawn = draw(logits, rows.seed, rows.start + known.shape[1], *how)
            known = torch.cat([known, drafted], dim=1) if self.draft.steps > 1 else known
            parts.append(drafted)
            facts.append(drawn)
        if len(parts) == 1:
            return parts[0], facts[0]
        return torch.cat(parts, dim=1), {name: torch.cat([each[name] for each in facts], dim=1) for name in facts[0]}
