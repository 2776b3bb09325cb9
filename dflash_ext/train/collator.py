"""Makes batches of blocks from samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .anchors import build_blocks, sample_anchors
from .randomness import generator
from .tau import commit_limits


@dataclass
class AnchorCollator:
    """Pads samples on the right, draws their anchors and makes the anchors' blocks.

    Samples are {"input_ids": int64 [S], "loss_mask": bool [S]}, with two optional entries:

    - "key": a tuple (seed, step, index) from which the sample's anchors follow, whatever else is in the batch. Without
      it they are drawn from torch's global generator.
    - "cut": True if the answer goes on beyond the end of `input_ids`.

    Batches hold `input_ids` [B, S], `anchors` and `keep` [B, N], the fields of `Blocks` [B, N, block_size], and
    `limits` [B, N], the tokens that a cycle could commit (`commit_limits`).

    Attributes:
        num_anchors: N, the number of blocks drawn from each sample.
        first_slot: the drafter's `config.first_draft_slot`.
    """

    num_anchors: int
    block_size: int
    mask_token_id: int
    first_slot: int = 1

    def __call__(self, samples: list[Mapping]) -> dict[str, Tensor]:
        input_ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True)
        loss_mask = pad_sequence([s["loss_mask"] for s in samples], batch_first=True)
        drafted = self.block_size - self.first_slot
        drawn = [self._draw(sample, drafted) for sample in samples]
        anchors, keep, limits = (torch.stack(each) for each in zip(*drawn, strict=True))
        blocks = build_blocks(
            input_ids,
            loss_mask,
            anchors,
            keep,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            first_slot=self.first_slot,
        )
        return {"input_ids": input_ids, "anchors": anchors, "keep": keep, "limits": limits, **vars(blocks)}

    def _draw(self, sample: Mapping, drafted: int) -> tuple[Tensor, Tensor, Tensor]:
        """The anchors of a sample, which of them are kept, and their limits: [N] each."""
        mask, key = sample["loss_mask"][None], sample.get("key")
        anchors, keep = sample_anchors(mask, self.num_anchors, key and generator("anchors", *key))
        limits = commit_limits(mask, anchors, keep, drafted, is_cut=sample.get("cut", False))
        return anchors[0], keep[0], limits[0]
