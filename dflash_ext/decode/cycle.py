"""A cycle: from one state of the rows to the next, on the device alone.

With a drafter: draft, verify, commit. Without one: the same without a draft, which is plain decoding. A cycle of one
forward, which verifies a draft and makes the next one, is in `one_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import count_tokens_, verify
from ..ops.cycle import CycleRows, begin_cycle, end_cycle
from ..reference import Verification
from .drafts import Draft
from .drafts.backlog import UnreadTokens
from .drawing import Drawing
from .forward import TargetForward
from .state import State
from .stopwatch import Stopwatch


class Cycle:
    """Drafts, verifies and commits once.

    Args:
        draft: None decodes plainly.

    Attributes:
        width: the largest number of drafted tokens.
        taps: the target's layers whose outputs the drafter reads.
        lead: the number of cycles that pass, after one without a draft, until one verifies a draft again.
        groups: of a cycle of one forward: at how many places a draft may end, from the first on, with the next draft
            behind them.
    """

    lead, groups = 0, None

    def __init__(self, state: State, target: TargetForward, draft: Draft | None):
        self.state, self.target, self.draft = state, target, draft
        self.width = draft.width if draft else 0
        self.taps = draft.taps if draft else ()

    def begin(self, slots: Tensor, drawing: Drawing) -> None:
        """What is to be done for new rows, whose prompts have been read."""

    def unread(self, slots: Sequence[int], width: int) -> int:
        """The number of tokens that the drafter reads `before` such a cycle."""
        backlog = None if self.draft is None else self.draft.backlog
        if backlog is None:
            return 0
        return sum(backlog.counts[slot] for late in backlog.late(slots, width) for slot in late)

    @property
    def reads_by_forward(self) -> bool:
        """Whether it reads them in a forward of its own, and not from features."""
        return isinstance(self.draft.backlog, UnreadTokens)

    def before(self, slots: Sequence[int], width: int) -> None:
        """What is to be done outside of a graph before a cycle of these slots that drafts `width` tokens."""
        if self.draft is not None:
            self.draft.catch_up(slots, width, self.state.numbers)

    def after(self, slots: Sequence[int], width: int) -> None:
        """What the host has to know of a cycle that did not fail."""
        if self.draft is not None and self.draft.backlog is not None:
            self.draft.backlog.count(slots, width)

    def __call__(self, slots: Tensor, drawing: Drawing, width: int, watch: Stopwatch) -> Tensor:
        """Advances the rows in these slots (int64 [B]) by one cycle that drafts `width` tokens.

        Returns the records of `end_cycle`, int64 [B, 4 + K].
        """
        rows = begin_cycle(self.state.numbers, slots, width, self.draft.block_len(width) if self.draft else 0)
        filters, changes = self._options(slots, drawing)
        tokens = rows.anchor[:, None]
        drafted, drawn = tokens[:, :0], {}
        if width:
            watch.start("draft")
            drafted, drawn = self.draft.draft(rows, width, filters, changes)
            tokens = torch.cat([tokens, drafted], dim=1)
        watch.start("verify")
        placed = rows.positions, rows.start, rows.q_len, rows.slots
        logits, features = self.target.read(tokens, *placed, self.taps)
        result = self._verify(rows, drafted, drawn, logits, filters, changes)
        watch.start("commit")
        records, kept = self._end(slots, rows, drafted, result, logits)
        if self.draft is not None:
            self.draft.commit(tokens, features, kept, rows.slots)
        self._count(slots, rows, drafted, result, changes)
        watch.stop()
        return records

    def clear(self, slot: int) -> None:
        """Empties a slot of the caches."""
        self.target.cache.clear(slot)
        if self.draft is not None:
            self.draft.clear(slot)

    def _options(self, slots: Tensor, drawing: Drawing) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The filters and the changes of logits of the rows in these slots."""
        return self.state.options_of(slots, drawing.filters), self.state.changes_of(slots, drawing.changes)

    def _verify(
        self,
        rows: CycleRows,
        drafted: Tensor,
        drawn: dict[str, Tensor],
        logits: Tensor,
        filters: dict[str, Tensor],
        changes: dict[str, Tensor],
    ) -> Verification:
        """Verifies drafted tokens [B, K], of which `drawn` says how they were drawn, by the target's logits."""
        chance = filters and {"seed": rows.seed + rows.start} | filters
        # Drafted tokens for which the row has no room are padding for the target, and are not verified.
        return verify(drafted, logits, draft_lens=rows.room, **chance, **drawn, **changes)

    def _end(
        self, slots: Tensor, rows: CycleRows, drafted: Tensor, result: Verification, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Commits in the state, and returns what `end_cycle` does."""
        state = self.state
        return end_cycle(state.numbers, slots, state.stops, rows, drafted, result.accepted, result.next_token, logits)

    def _count(
        self, slots: Tensor, rows: CycleRows, drafted: Tensor, result: Verification, changes: dict[str, Tensor]
    ) -> None:
        """Counts committed tokens for penalties. It comes last, because a cycle that fails is run again."""
        if "token_counts" not in changes:
            return
        ends = result.accepted[:, None]
        committed = torch.cat([drafted, result.next_token[:, None]], dim=1)
        committed = committed.scatter(1, ends, result.next_token[:, None])
        count_tokens_(self.state.counts, committed, lens=(ends[:, 0] + 1) * rows.active, table_rows=slots)
