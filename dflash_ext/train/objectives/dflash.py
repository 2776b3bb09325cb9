"""The objective of a DFlash drafter: the cross-entropy of the drafted slots of random blocks (arXiv 2602.06036)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models import DFlashDrafter, Target
from ...ops import linear_cross_entropy
from ..anchors import dpace
from ..losses import Losses
from ..parallel import is_sharded, whole_copy
from .drafting import DraftingObjective

# What the drafter of a checkpoint and the one that continues it have in common.
IDENTITY = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "block_size", "dflash_config"),
    *("sample_from_anchor", "is_causal", "window_convention", "noise"),
)


class DFlashObjective(DraftingObjective):
    """The losses of a DFlash drafter.

    The loss of a drafted slot compares its distribution, under the target's frozen head, with the token that the target
    generated or with the target's own distribution there. It is multiplied by the slot's weight. A slot counts if it
    has a label which the drafter can draft.

    Args:
        drafter: the drafter that is trained, in float32, or in the target's dtype without autocast.
        target: tapped at the drafter's layers.
        loss: "ce", the cross-entropy of the token; "kl" or "tv", the divergence or the total variation from the
            target's distribution (`linear_cross_entropy`). 1 - tv is the probability that a sampled draft is accepted.
        teacher_mix: the share of "kl" or "tv" in the loss, the rest being the cross-entropy.
        gamma: as in `DraftingObjective`.
        max_rows: a bound on the number of slots that count (see `linear_cross_entropy`). With it nothing waits for the
            device, so that the step can be captured in a CUDA graph.

    Raises:
        ValueError: the drafter was made for another target, or this target cannot teach its distributions.
    """

    def __init__(
        self,
        drafter: DFlashDrafter,
        target: Target,
        gamma: float | None = None,
        max_rows: int | None = None,
        loss: str = "ce",
        teacher_mix: float = 1.0,
    ):
        super().__init__(drafter, target, gamma)
        drafter.check_target(target)
        if loss != "ce":
            target.check_head()
        self.max_rows, self.loss, self.teacher_mix = max_rows, loss, teacher_mix

    def identity(self) -> dict:
        return {name: getattr(self.drafter.config, name) for name in IDENTITY} | {"target": self.target.fingerprint}

    def options(self) -> dict:
        return {"loss": self.loss, "teacher_mix": self.teacher_mix, "gamma": self.gamma}

    def drafter_to_decode(self) -> DFlashDrafter:
        if is_sharded(self.drafter) or self.drafter.dtype != self.target.dtype:
            return whole_copy(self.drafter, self.target.dtype)
        return self.drafter

    def forward(self, batch: Mapping[str, Tensor], features: Tensor, teacher_hidden: Tensor | None = None) -> Losses:
        """Runs the drafter once for all blocks of the batch.

        Args:
            features: the target's context features of the batch's sequences, [B, S, taps * H].
            teacher_hidden: the target's hidden states [B, S, H], which a loss other than "ce" needs (`of_target`).
        """
        drafter, length = self.drafter, batch["input_ids"].shape[1]
        context_positions = batch.get("context_positions")
        if context_positions is None:
            context_positions = torch.arange(length, device=features.device).expand(len(features), -1)
        hidden = drafter(
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
        return Losses(losses, counts, result.correct.view(counts.shape))

    def of_target(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What a call takes behind the batch: the target's features, and its hidden states if the loss needs them."""
        if "features" in batch and self.loss == "ce":
            return (batch["features"],)
        made = self.target.features_and_hidden(batch["input_ids"], batch.get("context_positions"))
        return made[:1] if self.loss == "ce" else made

    def _teacher(self, batch: Mapping[str, Tensor], hidden: Tensor | None) -> dict[str, Any]:
        if self.loss == "ce":
            return {}
        config, head = self.drafter.config, self.target.head
        if config.draft_vocab_size:
            head = head[self.drafter.drafted_tokens]
        return self.teacher(batch, hidden, config.block_size - self.first_slot, self.loss, self.teacher_mix, head)

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
        if "revealed" in batch or drafter.config.noise == "uniform":
            return {"noise_embeds": drafter.embed(self.target, noise.flatten(1))}
        embeds = drafter.embed(self.target, noise[:, :, 0])
        return {"noise_embeds": embeds, "mask_embed": drafter.embed(self.target, noise[0, 0, -1])}
