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
from .anchors import build_blocks, sample_anchors
from .objectives import DFlashObjective


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
        gamma: as in `DFlashObjective`.
    """

    def __init__(self, model: DFlashDrafter, target: Target, *, gamma: float | None = None, **kwargs):
        model.check_target(target)
        super().__init__(model=model, **kwargs)
        self.objective = DFlashObjective(model, target, gamma)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the whole step's blocks itself
        self._tau: list[Tensor] = []

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one step and the divisor of its loss."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        divisor = sum(self.objective.divisor(batch) for batch in batches)
        if self.args.world_size > 1:
            # Gradients are averaged over ranks, so the divisor is the ranks' mean.
            divisor = self.accelerator.gather(divisor.to(device)).float().mean()
        return batches, divisor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, counts, correct = self.objective(model, inputs, self.objective.target.features(inputs["input_ids"]))
        # In evaluation, Trainer passes a count of its own. Each batch is then divided by its own divisor.
        own = num_items_in_batch is None or not model.training
        divisor = self.objective.divisor(inputs) if own else num_items_in_batch
        loss = losses.sum() / divisor.clamp(min=1)
        if model.training:
            self._tau.append(_teacher_forced_tau(correct, counts))
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
