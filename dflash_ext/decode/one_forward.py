"""A cycle of one forward, which verifies a draft and makes the next one.

A draft may end behind any of its tokens. Behind each of them, and behind the anchor, stands a group of mask rows, which
sees the context up to there and itself. Once the verifier has said where the draft ends, the group of that place is the
next draft. Its first row stands for the bonus token, which only this forward determines, so the draft begins with its
second row.

Groups cost rows, and most drafts end early. So the last places may have no group: a row whose draft ends there has
nothing to verify in its next cycle, which ends at the anchor and makes a draft again.

At a temperature above 0, the group's tokens are drawn from logits that know nothing of the bonus token, or of each
other. This is lawful: rejection sampling keeps the target's distribution for any q from which the draft was really
drawn (Leviathan et al., arXiv 2211.17192). The draws of the verifier and those of the next draft are independent, so
which group becomes the draft says nothing about its draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.cycle import CycleRows, begin_cycle
from .cycle import Cycle
from .drafts import GatedDraft
from .drawing import Drawing
from .forward import LeanForward
from .forward.layers import Rows
from .state import State
from .stopwatch import Stopwatch

ONE_PASS = 64  # rows that a GPU's head reads at once in about the time of one


class OneForwardCycle(Cycle):
    """Verifies the draft that the cycle before has made, commits, and makes the next one.

    A group has `draft.width` mask rows, so that a draft has one token less. The first `groups` places at which a draft
    may end, from the anchor on, have one. What is kept of each slot's draft:

    tokens: int64 [slots, K]. lens: int64 [slots], 0 for no draft.
    drawn: what `verify` must know of the draws, [slots, K, ...] each; empty until a row at a temperature above 0 comes.
    """

    lead = 1

    def __init__(self, state: State, target: LeanForward, draft: GatedDraft, groups: int):
        super().__init__(state, target, draft)
        self.group, self.width, self.groups = draft.width, draft.width - 1, groups
        slots = len(state.numbers)
        self.tokens = torch.zeros(slots, self.width, dtype=torch.int64, device=state.device)
        self.lens = torch.zeros(slots, dtype=torch.int64, device=state.device)
        self.drawn: dict[str, Tensor] = {}
        # Of the groups' rows from the anchor, by the number of rows that verify: positions, and places in the cache.
        self.offsets: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, slots: Tensor, drawing: Drawing) -> None:
        """Makes the first draft of new rows, with their anchors known."""
        rows = begin_cycle(self.state.numbers, slots, self.width, self.draft.block_len(self.group))
        draft = self.draft.draft(rows, self.width, *self._options(slots, drawing))
        self._keep(slots, *draft, torch.full_like(slots, self.width))

    def __call__(self, slots: Tensor, drawing: Drawing, width: int, watch: Stopwatch) -> Tensor:
        """As that of `Cycle`; `width` tokens of the draft are verified. With none, no draft is made either."""
        watch.start("verify")
        rows = begin_cycle(self.state.numbers, slots, width, 0)
        lens = self.lens.index_select(0, slots)
        rows.room.clamp_(max=lens)
        rows.q_len.clamp_(max=lens + 1)
        filters, changes = self._options(slots, drawing)
        drafted = self.tokens.index_select(0, slots)[:, :width]
        sampled = bool(filters) and not self.draft.greedy
        drawn = {name: x.index_select(0, slots)[:, :width] for name, x in self.drawn.items()} if sampled else {}
        own, groups = self._forward(rows, torch.cat([rows.anchor[:, None], drafted], dim=1), width)
        logits, read_next = self._read_out(own, groups)
        result = self._verify(rows, drafted, drawn, logits, filters, changes)
        watch.start("commit")
        records, _ = self._end(slots, rows, drafted, result, logits)
        watch.start("draft")
        if width:
            how = result.next_token, rows.seed, rows.start + result.accepted + 2, filters, changes
            draft = self.draft.draw(*read_next(result.accepted), *how)
            self._keep(slots, *draft, torch.where(result.accepted < groups.shape[1], self.width, 0))
        else:
            self.lens.index_fill_(0, slots, 0)
        self._count(slots, rows, drafted, result, changes)
        watch.stop()
        return records

    def _forward(self, rows: CycleRows, tokens: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        """The outputs of the last layer for anchors and drafted tokens [B, width + 1, H], and for the rows of groups
        that are drafts, [B, groups, K, H]."""
        if not width:
            return self.target.hidden(tokens, rows.positions, rows.start, rows.q_len, rows.slots)[0], None
        verified, group = width + 1, self.group
        groups = min(self.groups, verified)
        if verified not in self.offsets:
            column = torch.arange(groups * group, device=tokens.device)
            self.offsets[verified] = 1 + column // group + column % group, verified + column
        positions, places = (rows.start[:, None] + offset for offset in self.offsets[verified])
        places = torch.where(rows.active[:, None] > 0, places, -1)
        where = Rows(
            torch.cat([rows.positions, self.draft.positions(positions)], dim=1),
            torch.cat([rows.positions, places], dim=1),
            rows.slots,
            self.draft.masks(rows, verified, group, groups),
        )
        masked = self.draft.embed_masks(len(tokens), groups * group)
        own, drafts = self.draft.rows.run(self.target.embed(tokens), masked, where)
        return own.contiguous(), drafts.view(len(tokens), groups, group, -1)[:, :, 1:]

    def _read_out(
        self, own: Tensor, groups: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor | None]] | None]:
        """The target's logits [B, width + 1, V], and what gives the next draft's logits and hidden states, as `denoise`
        does, from the numbers of accepted tokens int64 [B]. Behind the last group it is that group's."""
        row = torch.arange(len(own), device=own.device)
        if groups is None:
            return self.target.logits(own), None
        count, last = own[..., 0].numel(), groups.shape[1] - 1
        if not own.is_cuda or count + groups[..., 0].numel() > ONE_PASS:
            return self.target.logits(own), lambda accepted: self.draft.read_out(groups[row, accepted.clamp(max=last)])
        # The head is read once for all rows, before it is known which group they are of.
        logits = self.target.logits(torch.cat([own.flatten(0, 1), groups.flatten(0, 2)]))
        own_logits, others = logits[:count], logits[count:].view(*groups.shape[:-1], -1)

        def chosen(accepted: Tensor) -> tuple[Tensor, Tensor | None]:
            at = accepted.clamp(max=last)
            return self.draft.read_out(groups[row, at], others[row, at])

        return own_logits.view(*own.shape[:-1], -1), chosen

    def _keep(self, slots: Tensor, tokens: Tensor, drawn: dict[str, Tensor], lens: Tensor) -> None:
        """Keeps the draft of rows, of `lens` tokens (int64 [B]), for their next cycle."""
        for name, facts in drawn.items():
            if name not in self.drawn:
                self.drawn[name] = facts.new_zeros(len(self.tokens), *facts.shape[1:])
            self.drawn[name].index_copy_(0, slots, facts)
        self.tokens.index_copy_(0, slots, tokens)
        self.lens.index_copy_(0, slots, lens)
