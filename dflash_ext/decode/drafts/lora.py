"""LoRA drafters: the target drafts for itself, with an adapter on the rows of a block or on all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import IntervalMask
from ...models.lora import LoraDrafter
from ...ops.cycle import CycleRows
from ...reference.numerics import softcapped
from ..forward import LeanForward
from ..forward.adapted import AdaptedForward
from ..forward.layers import Rows
from ..forward.masks import causal_masks
from ..kv_cache import MOST_ROWS
from .backlog import UnreadTokens
from .base import Draft, narrow
from .sampler import CandidateSampler


class LoraDraft(Draft):
    """What both kinds of LoRA drafter share.

    Args:
        forward: that of the drafter's base, which is the target's unless another model verifies.
        width, steps, greedy: as in `Draft`.
    """

    def __init__(self, drafter: LoraDrafter, forward: LeanForward, *, width: int, steps: int, greedy: bool):
        target = forward.target
        sampler = CandidateSampler(drafter.sampler, target) if drafter.sampler is not None else None
        super().__init__(target, width=width, steps=steps, greedy=greedy, sampler=sampler)
        self.forward, self.causal = forward, drafter.config.causal
        self.mask_token = drafter.config.mask_token_id
        self.mask_embedding = drafter.mask_embedding.detach().to(target.device, target.dtype)
        self.rows = AdaptedForward(forward, drafter.adapter)
        self.head = narrow(target.head, target.dtype)

    def block_len(self, width: int) -> int:
        return width + 1 if width else 0

    def embed_masks(self, entries: int, count: int) -> Tensor:
        """The inputs [B, count, H] of mask rows."""
        return self.mask_embedding.repeat(entries, count, 1)

    def read_out(self, hidden: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What `denoise` gives, of the outputs of the last layer [B, count, H]. A draft never has the mask token.

        logits: [B, count, V], if they are known. They are overwritten.
        """
        hidden = hidden.contiguous()
        if logits is None:
            logits = softcapped(self.forward.stack.head(hidden, self.head), self.target.softcap)
        logits[..., self.mask_token] = -torch.inf
        return logits, None if self.sampler is None else self.normed(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """The output of the final norm, [B, count, H]."""
        return self.forward.stack.normed(hidden.flatten(0, 1)).view_as(hidden)

    def positions(self, positions: Tensor) -> Tensor:
        """The positions of rows, the last one that the target has for those beyond it, which nothing will need."""
        return positions.clamp(max=self.forward.positions - 1)


class GatedDraft(LoraDraft):
    """An adapter on mask rows alone. They see the target's own keys and values, so that its cache serves both.

    The block is the anchor, which the base reads, and a group of mask rows, which sees the context up to and with it.
    """

    def denoise(self, rows: CycleRows, known: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        block, first = rows.block_positions.shape[1], known.shape[1]
        embedded = self.forward.embed(known)
        group = torch.cat([embedded[:, 1:], self.embed_masks(len(known), block - first)], dim=1)
        masks = self.masks(rows, 1, block - 1)
        where = Rows(self.positions(rows.block_positions), rows.block_places, rows.slots, masks)
        _, hidden = self.rows.run(embedded[:, :1], group, where)
        return self.read_out(hidden[:, first - 1 : first - 1 + count])

    def masks(self, rows: CycleRows, verified: int, group: int, groups: int = 1) -> dict[str, IntervalMask]:
        """The masks of `verified` rows from the anchors on, and of a group of mask rows behind the first `groups`."""
        options = {"groups": groups, "q_lens": rows.q_len, "causal": self.causal, "kv_len": self.forward.capacity}
        return {
            kind: IntervalMask.verify_and_draft(rows.start, verified, group, window=window, **options)
            for kind, window in self.forward.windows.items()
        }


class WholeDraft(LoraDraft):
    """An adapter on every row, the context's too, which has a cache of its own.

    The block is the anchor and the mask rows, and sees the context strictly before the anchor. The draft reads what the
    cycle before has committed in the same forward.

    Args:
        slots, tokens: the number of rows, and the largest number of tokens in a row, as in `KVCache`.
    """

    def __init__(self, drafter: LoraDrafter, forward: LeanForward, *, slots: int, tokens: int, **options):
        super().__init__(drafter, forward, **options)
        # The cache of a base that verifies has the keys and values without the adapter.
        self.cache = forward.make_cache(slots, tokens, MOST_ROWS) if drafter.base is None else forward.cache
        self.backlog = UnreadTokens(slots, tokens, self.width + 1, forward.target.device)

    def inject(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Reads tokens with the adapter."""
        counts, start = (positions >= 0).sum(dim=1), positions[:, 0].clamp(min=0)
        self._read(self.forward.embed(tokens), positions, slots, self._causal(start, tokens.shape[1], counts))

    def commit(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        self.backlog.keep(tokens[..., None], positions, slots)

    def denoise(self, rows: CycleRows, known: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        block, first = rows.block_positions.shape[1], known.shape[1]
        counts = self.backlog.waiting(rows)
        waiting, _, places = self.backlog.take(rows.start, counts, rows.slots, self.backlog.room)
        before = self._causal(rows.start - counts, waiting.shape[1], counts)
        embedded = self.forward.embed(torch.cat([waiting, known], dim=1))
        embedded = torch.cat([embedded, self.embed_masks(len(known), block - first)], dim=1)
        options = {"q_lens": rows.active * block, "causal": self.causal, "kv_len": self.cache.capacity}
        masks = {
            kind: _stacked(
                before[kind], IntervalMask.decode(rows.start, block, window=window, convention="zlab", **options)
            )
            for kind, window in self.forward.windows.items()
        }
        positions = torch.cat([places, self.positions(rows.block_positions)], dim=1)
        places = torch.cat([places, rows.block_places], dim=1)
        hidden = self._read(embedded, positions, rows.slots, masks, places)[:, waiting.shape[1] :]
        self.backlog.mark(rows)
        return self.read_out(hidden[:, first : first + count])

    def _causal(self, start: Tensor, count: int, exist: Tensor) -> dict[str, IntervalMask]:
        return causal_masks(self.forward.windows, start, count, exist, self.cache.capacity)

    def _read(
        self,
        embedded: Tensor,
        positions: Tensor,
        slots: Tensor,
        masks: dict[str, IntervalMask],
        places: Tensor | None = None,
    ) -> Tensor:
        where = Rows(positions, positions if places is None else places, slots, masks)
        return self.rows.run(embedded[:, :0], embedded, where, self.cache)[1]


def _stacked(*masks: IntervalMask) -> IntervalMask:
    """The rows of masks over the same keys, one mask after the other."""
    names = "ctx_lo", "ctx_hi", "blk_lo", "blk_hi"
    bounds = (torch.cat([getattr(mask, name) for mask in masks], dim=1) for name in names)
    return IntervalMask(*bounds, masks[0].kv_len)
