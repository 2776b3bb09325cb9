"""The objective of a DFlash drafter: the cross-entropy of the drafted slots of random blocks (arXiv 2602.06036)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models import DFlashDrafter, Target
from ...ops import linear_cross_entropy
from ..anchors import dpace, position_decay


class BlockLosses(NamedTuple):
    """The results of the K drafted slots of a batch's blocks: ``[B, N, K]`` each.

    Attributes:
        losses: float32, the weighted negative log-likelihoods of the labels, 0 where a slot does not count.
        counts: bool, the slots that have a label which the drafter can draft.
        correct: bool, whether the label is the drafter's most probable token.
    """

    losses: Tensor
    counts: Tensor
    correct: Tensor


@dataclass
class DFlashObjective:
    """The losses of a drafter on a batch of ``AnchorCollator``.

    The loss of a drafted slot is the cross-entropy of its token under the target's frozen head, times its weight.

    Attributes:
        gamma: the decay of `position_decay` (7, 5, 4 for blocks of 16, 10, 8 in the paper); None weights by `dpace`.
        max_rows: a bound on the number of slots that count (see `linear_cross_entropy`). With it nothing waits for the
            device, so that the step can be captured in a CUDA graph.
    """

    drafter: DFlashDrafter
    target: Target
    gamma: float | None = None
    max_rows: int | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], features: Tensor) -> BlockLosses:
        """Runs `model`, which is the drafter or a module that wraps it, once for all blocks of the batch.

        Args:
            features: the target's context features of the batch's sequences, [B, S, taps * H].
        """
        drafter, length = self.drafter, batch["input_ids"].shape[1]
        context_positions = batch.get("context_positions")
        if context_positions is None:
            context_positions = torch.arange(length, device=features.device).expand(len(features), -1)
        noise = batch["noise_ids"]
        hidden = model(
            noise_embeds=drafter.embed(self.target, noise[:, :, 0]),
            mask_embed=drafter.embed(self.target, noise[0, 0, -1]),
            context_hidden_states=features,
            position_ids=torch.cat([context_positions, batch["positions"].flatten(1)], dim=1),
            attention_mask=drafter.anchor_masks(length, batch["anchors"], batch["keep"], batch.get("context_start")),
            first_slot=self.first_slot,
        ).last_hidden_state
        labels, counts = self.labels(batch)
        head = drafter.head(self.target)
        result = linear_cross_entropy(
            drafter.head_input(hidden).flatten(0, 1).to(head.dtype),
            head,
            labels.flatten(),
            self.slot_weights(counts).flatten(),
            max_rows=self.max_rows,
            reduction="none",
            softcap=drafter.softcap,
        )
        losses = result.loss.view(counts.shape)
        if self.gamma is None:
            losses = losses * dpace(result.nll.view(counts.shape), counts)
        return BlockLosses(losses, counts, result.correct.view(counts.shape))

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The target's context features of the batch's sequences, [B, S, taps * H]."""
        return self.target.features(batch["input_ids"], batch.get("context_positions"))

    @property
    def first_slot(self) -> int:
        return self.drafter.config.first_draft_slot

    def labels(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The drafted slots' labels as rows of the drafter's head, and which of them count: [B, N, K] each.

        Once the drafter cannot draft the label of a slot, this slot and all later ones of the block do not count.
        """
        labels = self.drafter.head_labels(batch["labels"][:, :, self.first_slot :])
        counts = batch["counts"][:, :, self.first_slot :] & (labels >= 0)
        return labels.clamp(min=0), counts.cumprod(dim=-1).bool()

    def slot_weights(self, counts: Tensor) -> Tensor:
        """The weights of drafted slots [..., K] that are known before the forward pass."""
        if self.gamma is None:
            return counts.float()
        return counts * position_decay(counts.shape[-1], self.gamma, first_slot=0, device=counts.device)

    def divisor(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What a batch adds to the loss's divisor: the sum of its weights, or with D-PACE the number of its blocks."""
        return batch["keep"].sum() if self.gamma is None else self.slot_weights(self.labels(batch)[1]).sum()
