"""A cycle: from one state of the rows to the next, on the device alone.

With a drafter: draft, verify, commit. Without one: the same without a draft, which is plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..masks import IntervalMask
from ..models import Target
from ..ops import sample, verify
from .draft import BlockDraft
from .forward.families import capped, embedding_of, head_softcap, target_stack
from .forward.layers import Rows
from .kv_cache import KVCache
from .state import OFF, RowState, State
from .stopwatch import Stopwatch


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn: `filters` are the options that some row uses; none of them is greedy decoding."""

    filters: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: list[dict[str, float]]) -> Drawing:
        used = tuple(name for name, off in OFF.items() if any(row[name] != off for row in options))
        return cls(used if "temperature" in used else ())

    @property
    def greedy(self) -> bool:
        return not self.filters


class TargetForward:
    """The target over the engine's cache.

    Args:
        slots, tokens: the number of rows, and the largest number of tokens in a row, as in `KVCache`.
        exact: the bits of a row depend on that row alone, whatever is computed beside it.
    """

    def __init__(self, target: Target, *, slots: int, tokens: int, exact: bool = False):
        self.target, self.exact = target, exact
        like = target.head
        config = target.config
        head_dim = target.layers[0].self_attn.head_dim
        self.cache = KVCache(
            target.num_layers,
            slots,
            config.num_key_value_heads,
            head_dim,
            tokens,
            dtype=like.dtype,
            device=like.device,
        )
        self.stack = replace(target_stack(target, self.cache.capacity), exact=exact)
        self.embed = embedding_of(target)
        self.windows = {kind: config.sliding_window if kind == "sliding_attention" else None for kind in self.kinds}

    @property
    def kinds(self) -> set[str]:
        return set(self.stack.rotary)

    def hidden(self, tokens: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads tokens [B, R] at positions from `start` [B] on, of which the first `counts` [B] of a row exist.

        Returns the output of the last layer [B, R, H] and the features [B, R, taps * H], None without taps.
        """
        column = torch.arange(tokens.shape[1], device=tokens.device)
        positions = torch.where(column < counts[:, None], start[:, None] + column, -1)
        options = {"q_lens": counts, "causal": True, "kv_len": self.cache.capacity}
        masks = {
            kind: IntervalMask.decode(start, tokens.shape[1], window=window, **options)
            for kind, window in self.windows.items()
        }
        rows = Rows(positions, positions, slots, masks)
        hidden, features = self.stack.forward(self.embed(tokens).flatten(0, 1), rows, self.cache, self.target.tap_ids)
        return hidden.view(*tokens.shape, -1), None if features is None else features.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output of the last layer [..., H] to logits [..., V]."""
        return capped(self.stack.head(hidden, self.target.head), head_softcap(self.target))


def draw(logits: Tensor, rows: RowState, positions: Tensor, drawing: Drawing) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws the tokens [B, K] at `positions` from logits [B, K, V], and what `verify` must know of the draw."""
    if drawing.greedy:
        return logits.argmax(dim=-1), {}
    count = logits.shape[1]
    options = {name: rows.options[name].repeat_interleave(count) for name in drawing.filters}
    drawn = sample(logits.flatten(0, 1), (rows.seed[:, None] + positions).flatten(), **options)
    pivot, normaliser = (x.view(positions.shape) for x in (drawn.pivot, drawn.normaliser))
    known = {"draft_logits": logits, "draft_pivot": pivot, "draft_normaliser": normaliser}
    return drawn.token.view(positions.shape), known


class Cycle:
    """Drafts, verifies and commits once.

    Args:
        draft: None decodes plainly.
    """

    # The columns of a record before the drafted tokens.
    COLUMNS = ("active", "verified", "accepted", "next")

    def __init__(self, state: State, target: TargetForward, draft: BlockDraft | None):
        self.state, self.target, self.draft = state, target, draft
        self.width = draft.width if draft else 0

    def __call__(self, slots: Tensor, drawing: Drawing, watch: Stopwatch) -> Tensor:
        """Advances the rows in these slots (int64 [B]) by one cycle.

        Returns int64 [B, 4 + K], one record a row: whether it was active, how many drafted tokens were verified, how
        many of them were accepted, the target's own token after them, and the drafted tokens.
        """
        rows, slot = self.state.of(slots), slots.int()
        column = torch.arange(self.width + 1, device=slots.device)
        # Drafted tokens for which the row has no room are padding for the target, and are not verified.
        room = (rows.last - rows.start).clamp(0, self.width) * rows.active
        drafted, drawn = rows.anchor[:, None][:, :0], {}
        if self.draft is not None:
            watch.start("draft")
            logits = self.draft.denoise(rows, slot)
            drafted, drawn = draw(logits, rows, rows.start[:, None] + column[1:], drawing)
            watch.stop()
        watch.start("verify")
        tokens = torch.cat([rows.anchor[:, None], drafted], dim=1)
        hidden, features = self.target.hidden(tokens, rows.start, (room + 1) * rows.active, slot)
        result = verify(drafted, self.target.logits(hidden), draft_lens=room, **self._options(rows, drawing), **drawn)
        committed = column <= result.accepted[:, None]
        if self.draft is not None:
            kept = committed & rows.active[:, None]
            self.draft.inject(features, torch.where(kept, rows.start[:, None] + column, -1), slot)
        record = [rows.active.long(), room, result.accepted, result.next_token]
        new = torch.cat([drafted, result.next_token[:, None]], dim=1)
        new = torch.where(column == result.accepted[:, None], result.next_token[:, None], new)
        stopped = ((new[:, :, None] == rows.stops[:, None]) & committed[:, :, None]).flatten(1).any(1)
        start = rows.start + (result.accepted + 1) * rows.active
        active = rows.active & ~stopped & (start <= rows.last)
        self.state.advance(slots, rows, start, torch.where(rows.active, result.next_token, rows.anchor), active)
        watch.stop()
        return torch.cat([torch.stack(record, dim=1), drafted], dim=1)

    def _options(self, rows: RowState, drawing: Drawing) -> dict[str, Tensor]:
        if drawing.greedy:
            return {}
        return {"seed": rows.seed + rows.start} | {name: rows.options[name] for name in drawing.filters}
