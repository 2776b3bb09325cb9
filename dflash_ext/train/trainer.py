"""Trains a DFlash drafter with transformers' Trainer. The frozen target computes the features of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from ..models import DFlashDrafter, Target
from ..ops import linear_cross_entropy
from .anchors import build_blocks, dpace, position_decay, sample_anchors


@dataclass
class AnchorCollator:
    """Pads samples on the right, draws their anchors and makes the anchors' blocks.

    Samples are {"input_ids": int64 [S], "loss_mask": bool [S]}. Batches hold `input_ids` [B, S], `anchors` and `keep`
    [B, N] and the fields of `Blocks` [B, N, block_size]. `first_slot` is the drafter's `config.first_draft_slot`.
    """

    num_anchors: int
    block_size: int
    mask_token_id: int
    first_slot: int = 1

    def __call__(self, samples: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        input_ids = pad_sequence([s["input_ids"] for s in samples], batch_first=True)
        loss_mask = pad_sequence([s["loss_mask"] for s in samples], batch_first=True)
        anchors, keep = sample_anchors(loss_mask, self.num_anchors)
        blocks = build_blocks(
            input_ids,
            loss_mask,
            anchors,
            keep,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            first_slot=self.first_slot,
        )
        return {"input_ids": input_ids, "anchors": anchors, "keep": keep, **vars(blocks)}


class DFlashTrainer(Trainer):
    """Trains a drafter against a frozen target.

    The loss is the cross-entropy of each drafted slot's token under the target's frozen head, weighted by slot. It is
    divided by the sum of the weights of the whole step, over accumulated batches and ranks. D-PACE weights depend on
    the drafter, so with them it is divided by the number of blocks instead.

    Args:
        model: the drafter.
        target: the frozen target, tapped at the drafter's layers; it stays outside the trained model.
        gamma: the decay of `position_decay` (7, 5, 4 for blocks of 16, 10, 8 in the paper); None weights by `dpace`.
    """

    def __init__(self, model: DFlashDrafter, target: Target, *, gamma: float | None = None, **kwargs):
        model.check_target(target)
        super().__init__(model=model, **kwargs)
        self.target = target
        self.gamma = gamma
        self.drafter = model
        self.first_slot = model.config.first_draft_slot
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the whole step's blocks itself
        self._tau: list[Tensor] = []

    def _labels(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The drafting slots' labels as rows of the drafter's head, and which of them count: [B, N, K] each.

        Slots from the first label on that the drafter cannot draft do not count.
        """
        labels = self.drafter.head_labels(inputs["labels"][:, :, self.first_slot :])
        counts = inputs["counts"][:, :, self.first_slot :] & (labels >= 0)
        return labels.clamp(min=0), counts.cumprod(dim=-1).bool()

    def _slot_weights(self, counts: Tensor) -> Tensor:
        """The weights of drafting slots [..., K] that are known before the forward pass."""
        if self.gamma is None:
            return counts.float()
        return counts * position_decay(counts.shape[-1], self.gamma, first_slot=0).to(counts.device)

    def _divisor(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a batch adds to the loss's divisor: the sum of its weights, or with D-PACE the number of its blocks."""
        return inputs["keep"].sum() if self.gamma is None else self._slot_weights(self._labels(inputs)[1]).sum()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step and the divisor of its loss."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        divisor = sum(self._divisor(batch) for batch in batches)
        if self.args.world_size > 1:
            # Gradients are averaged over ranks, so the divisor is the ranks' mean.
            divisor = self.accelerator.gather(divisor.to(device)).float().mean()
        return batches, divisor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        drafter = self.drafter
        input_ids, anchors, keep = inputs["input_ids"], inputs["anchors"], inputs["keep"]
        context_positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden = model(
            noise_embeds=drafter.embed(self.target, inputs["noise_ids"].flatten(1)),
            context_hidden_states=self.target.features(input_ids),
            position_ids=torch.cat([context_positions, inputs["positions"].flatten(1)], dim=1),
            attention_mask=drafter.anchor_masks(input_ids.shape[1], anchors, keep),
        ).last_hidden_state

        # Slots before the first drafting slot are dropped. This is the anchor's slot, unless slot 0 drafts.
        labels, counts = self._labels(inputs)
        head = drafter.head(self.target)
        hidden = drafter.head_input(hidden).unflatten(1, inputs["labels"].shape[1:])[:, :, self.first_slot :]
        result = linear_cross_entropy(
            hidden.flatten(0, 2).to(head.dtype),
            head,
            labels.flatten(),
            self._slot_weights(counts).flatten(),
            reduction="none",
            softcap=drafter.softcap,
        )
        loss = result.loss.view(counts.shape)
        if self.gamma is None:
            loss = loss * dpace(result.nll.view(counts.shape), counts)
        # In evaluation, Trainer passes a count of its own. Each batch is then divided by its own divisor.
        divisor = self._divisor(inputs) if num_items_in_batch is None or not model.training else num_items_in_batch
        loss = loss.sum() / divisor.clamp(min=1)
        if model.training:
            self._tau.append(_teacher_forced_tau(result.correct.view(counts.shape), counts))
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """Logs, beside the loss, the tau that greedy decoding would have had on the blocks since the last log."""
        if "loss" in logs and self._tau:
            logs["tau"] = round(torch.stack(self._tau).mean().item(), 3)
            self._tau.clear()
        super().log(logs, *args, **kwargs)


def _teacher_forced_tau(correct: Tensor, counts: Tensor) -> Tensor:
    """The mean number of leading slots that are right, plus 1 for the bonus token: a 0-d tensor.

    Only blocks with a label in every slot count.
    """
    whole = counts.all(dim=-1)
    run = correct.int().cumprod(dim=-1).sum(dim=-1)
    return 1 + (run * whole).sum() / whole.sum().clamp(min=1)
