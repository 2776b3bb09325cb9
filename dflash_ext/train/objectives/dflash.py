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

    The loss of a drafted slot compares its distribution, under the target's frozen head, with the token that the target
    generated or with the target's own distribution there. It is multiplied by the slot's weight.

    Attributes:
        loss: "ce", the cross-entropy of the token; "kl" or "tv", the divergence or the total variation from the
            target's distribution (`linear_cross_entropy`). 1 - tv is the probability that a sampled draft is accepted.
        teacher_mix: the share of "kl" or "tv" in the loss, the rest being the cross-entropy.
        gamma: the decay of `position_decay` (7, 5, 4 for blocks of 16, 10, 8 in the paper); None weights by `dpace`.
        max_rows: a bound on the number of slots that count (see `linear_cross_entropy`). With it nothing waits for the
            device, so that the step can be captured in a CUDA graph.
    """

    drafter: DFlashDrafter
    target: Target
    gamma: float | None = None
    max_rows: int | None = None
    loss: str = "ce"
    teacher_mix: float = 1.0

    def __post_init__(self):
        if self.loss != "ce":
            self.target.check_head()

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], features: Tensor, teacher_hidden: Tensor | None = None
    ) -> BlockLosses:
        """Runs `model`, which is the drafter or a module that wraps it, once for all blocks of the batch.

        Args:
            features: the target's context features of the batch's sequences, [B, S, taps * H].
            teacher_hidden: the target's hidden states [B, S, H], which a loss other than "ce" needs (`of_target`).
        """
        drafter, length = self.drafter, batch["input_ids"].shape[1]
        context_positions = batch.get("context_positions")
        if context_positions is None:
            context_positions = torch.arange(length, device=features.device).expand(len(features), -1)
        hidden = model(
            **self._noise(batch),
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
            **self._teacher(batch, teacher_hidden),
        )
        losses = result.loss.view(counts.shape)
        if self.gamma is None:
            losses = losses * dpace(result.nll.view(counts.shape), counts)
        return BlockLosses(losses, counts, result.correct.view(counts.shape))

    def of_target(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a call takes behind the batch: the target's features, and its hidden states if the loss needs them."""
        if "features" in batch and self.loss == "ce":
            return (batch["features"],)
        made = self.target.features_and_hidden(batch["input_ids"], batch.get("context_positions"))
        return made[:1] if self.loss == "ce" else made

    def _teacher(self, batch: Mapping[str, Tensor], hidden: Tensor | None) -> dict:
        """The options of `linear_cross_entropy` for the target's distributions.

        The token of a drafted slot is predicted at the token before it: those of a block from the anchor on.
        """
        if self.loss == "ce":
            return {}
        config, head = self.drafter.config, self.target.head
        slots = torch.arange(config.block_size - self.first_slot, device=hidden.device)
        columns = (batch["anchors"][:, :, None] + slots).clamp(max=hidden.shape[1] - 1)
        rows = columns + hidden.shape[1] * torch.arange(len(hidden), device=hidden.device)[:, None, None]
        return {
            "teacher_hidden": hidden.flatten(0, 1),
            "teacher_head": head[self.drafter.drafted_tokens] if config.draft_vocab_size else head,
            "teacher_row": rows.flatten(),
            "teacher_softcap": self.target.softcap,
            "teacher_kind": self.loss,
            "teacher_mix": self.teacher_mix,
        }

    @property
    def first_slot(self) -> int:
        return self.drafter.config.first_draft_slot

    def labels(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The drafted slots' labels as rows of the drafter's head, and which of them count: [B, N, K] each.

        Once the drafter cannot draft the label of a slot, this slot and all later ones of the block do not count. Nor
        do the slots whose tokens the block shows.
        """
        labels = self.drafter.head_labels(batch["labels"][:, :, self.first_slot :])
        counts = batch["counts"][:, :, self.first_slot :] & (labels >= 0)
        counts = counts.cumprod(dim=-1).bool()
        if "revealed" in batch:
            counts &= torch.arange(counts.shape[-1], device=counts.device) >= batch["revealed"][:, :, None]
        return labels.clamp(min=0), counts

    def _noise(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The embedded slots as the drafter takes them: the mask token once if it is in all slots but the anchors'."""
        drafter, noise = self.drafter, batch["noise_ids"]
        if "revealed" in batch:
            return {"noise_embeds": drafter.embed(self.target, noise.flatten(1))}
        embeds = drafter.embed(self.target, noise[:, :, 0])
        return {"noise_embeds": embeds, "mask_embed": drafter.embed(self.target, noise[0, 0, -1])}

    def slot_weights(self, counts: Tensor) -> Tensor:
        """The weights of drafted slots [..., K] that are known before the forward pass."""
        if self.gamma is None:
            return counts.float()
        return counts * position_decay(counts.shape[-1], self.gamma, first_slot=0, device=counts.device)

    def divisor(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What a batch adds to the loss's divisor: the sum of its weights, or with D-PACE the number of its blocks."""
        return batch["keep"].sum() if self.gamma is None else self.slot_weights(self.labels(batch)[1]).sum()
