"""The first guess of a canvas by a DFlash drafter, which reads the hidden states of the denoiser's own encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import DFlashDrafter, Target
from ...ops.cycle import FIELDS, CycleRows
from ..drafts.block import BlockDraft
from .rows import Rows


class FirstGuess:
    """Drafts canvases, each a block behind the last committed token, which is the block's anchor.

    Args:
        target: the denoiser's model, tapped at the drafter's layers.
        length: that of a canvas.
        slots, tokens: the number of rows, and the largest number of tokens in a row, as in `KVCache`.

    Raises:
        ValueError: the drafter was made for another target, or its blocks have no room for a canvas.
    """

    def __init__(self, drafter: DFlashDrafter, target: Target, *, length: int, slots: int, tokens: int):
        drafter.check_target(target)
        if drafter.config.block_size - drafter.config.first_draft_slot < length:
            raise ValueError(
                f"the drafter's blocks have {drafter.config.block_size} slots: no room for a canvas of {length} tokens"
            )
        self.draft, self.length = BlockDraft(drafter, target, width=length, slots=slots, tokens=tokens), length
        width, like = len(target.tap_ids) * target.hidden_size, drafter.fc.weight
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=like.device)
        self.features = torch.zeros(slots, width, dtype=target.dtype, device=like.device)

    def read(self, tokens: Tensor, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Keeps what the encoder has read; the arguments are those of `Draft.inject`."""
        self.draft.inject(tokens, features, positions, slots)
        index, counts = slots.long(), (positions >= 0).sum(dim=1)
        last, any_read = (counts - 1).clamp(min=0), counts > 0
        row = torch.arange(len(index), device=index.device)
        token = torch.where(any_read, tokens[row, last], self.tokens[index])
        feature = torch.where(any_read[:, None], features[row, last].to(self.features.dtype), self.features[index])
        self.tokens.index_copy_(0, index, token)
        self.features.index_copy_(0, index, feature)

    def __call__(self, rows: Rows, slots: Tensor) -> Tensor:
        """The likeliest tokens of the canvases that rows begin, int64 [N, L]."""
        active, anchor = (rows.length > 0).long(), self.tokens[slots]
        start = (rows.start - 1).clamp(min=0)
        positions = start[:, None] + torch.arange(self.draft.block_len(self.length), device=start.device)
        places = torch.where(active[:, None] > 0, positions, -1)
        told = {"start": start, "anchor": anchor, "last": start + self.length, "active": active, "seed": rows.seed}
        room = active * self.length
        readings = torch.stack([*(told[field] for field in FIELDS), room, room + active])
        block = CycleRows(readings, slots.int(), positions[:, : self.length + 1], positions, places)
        guess, _ = self.draft.draft(block, self.length, {}, {})
        # The block has overwritten what the drafter keeps of the anchor.
        self.draft.inject(anchor[:, None], self.features[slots][:, None], places[:, :1], slots.int())
        return guess
