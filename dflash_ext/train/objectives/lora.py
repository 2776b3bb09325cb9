"""The objective of a LoRA drafter: cross-entropy and divergence from the base of the masked slots of random blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...models import LoraDrafter, Target
from ...models.lora import read_context, share_layers
from ...ops import linear_cross_entropy
from ..anchors import dpace, one_forward_dpace
from ..losses import Losses
from ..parallel import whole_copy
from .drafting import DraftingObjective


class LoraObjective(DraftingObjective):
    """The losses of a LoRA drafter.

    The loss of a masked slot compares its distribution, under the base's frozen head, with the token at its position
    and, by `kl_weight`, with the base's own distribution of that token on the clean text. It is multiplied by the
    slot's weight. Slots that show their tokens do not count.

    A gated drafter's context is the base's. The base reads it once, without gradient, and only the blocks' rows run
    with the adapter. A whole drafter runs the context's rows with the adapter, too.

    A sampler head is trained beside the rest. It is given the right token before each slot, and its loss is added.

    Args:
        drafter: in float32, or in the target's dtype without autocast.
        gamma: as in `DraftingObjective`.
        kl_weight: the weight of the divergence from the base's distributions, beside a weight of 1 for the tokens.
        forwards: those of the decoding cycles that the weights are for, 2 or 1; `one_forward_dpace` has those for 1.

    Raises:
        ValueError: the drafter was made for another base, or the base's logits are not those of its head.
    """

    shards_target = True  # it is the model that runs, and by far the larger part
    waits = False

    def __init__(
        self,
        drafter: LoraDrafter,
        target: Target,
        *,
        gamma: float | None = None,
        kl_weight: float = 0.0,
        forwards: int = 2,
    ):
        super().__init__(drafter, target, gamma)
        drafter.config.check_target(target)
        if forwards == 1:
            drafter.config.check_one_forward()
        target.check_head()
        self.kl_weight, self.forwards = kl_weight, forwards

    def identity(self) -> dict:
        config, adapter = self.drafter.config, self.drafter.adapter
        linears = sorted({path.rpartition(".")[2] for path in adapter.paths})
        own = {
            name: getattr(config, name) for name in ("kind", "block_size", "mask_token_id", "causal", "sampler_width")
        }
        return own | {"rank": adapter.rank, "alpha": adapter.alpha, "linear layers": linears, "base": config.base}

    def options(self) -> dict:
        return {"kl_weight": self.kl_weight, "gamma": self.gamma, "forwards": self.forwards}

    def drafter_to_decode(self) -> LoraDrafter:
        return whole_copy(self.drafter, self.target.dtype)

    def share_layers(self, mesh: DeviceMesh) -> None:
        share_layers(self.drafter, self.target, mesh)

    def of_target(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The base's hidden states [B, S, H], and for a gated drafter its keys and values, two tensors a layer.

        A whole drafter without divergence needs neither.
        """
        is_gated = self.drafter.config.kind == "gated"
        if not (is_gated or self.kl_weight):
            return ()
        positions = _context_positions(batch)
        masks = self.drafter.context_masks(self.target, positions)
        hidden, states = read_context(self.target, batch["input_ids"], positions, masks)
        return hidden, *(each for pair in states for each in pair if is_gated)

    def forward(self, batch: Mapping[str, Tensor], base_hidden: Tensor | None = None, *states: Tensor) -> Losses:
        """Runs the blocks of a batch with the adapter. What stands behind the batch is from `of_target`."""
        labels, counts = self.labels(batch)
        hidden = self._rows(batch, states).view(*labels.shape, -1)
        teacher = self._teacher(batch, base_hidden) if self.kl_weight else {}
        result = self._losses(hidden, labels, counts, teacher)
        if self.drafter.sampler is None:
            return result
        before = self.target.model.get_input_embeddings()(batch["labels"][:, :, :-1])
        refined = self._losses(self.drafter.sampler(hidden, before), labels, counts, teacher)
        return refined._replace(losses=refined.losses + result.losses)

    def labels(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return batch["labels"][:, :, 1:], batch["counts"][:, :, 1:]

    def _rows(self, batch: Mapping[str, Tensor], states: tuple[Tensor, ...]) -> Tensor:
        """The hidden states of all drafted slots, one below the other."""
        drafter, target = self.drafter, self.target
        positions, context_positions = batch["positions"], _context_positions(batch)
        masks = drafter.anchor_masks(target, context_positions, batch["anchors"], batch["keep"])
        if drafter.config.kind == "gated":
            inputs = drafter.embed(target, batch["noise_ids"][:, :, 1:].flatten(1))
            context = list(zip(states[::2], states[1::2], strict=True))
            return drafter(target, inputs, positions[:, :, 1:].flatten(1), masks, context)
        inputs = drafter.embed(target, torch.cat([batch["input_ids"], batch["noise_ids"].flatten(1)], dim=1))
        rows = torch.cat([context_positions, positions.flatten(1)], dim=1)
        hidden = drafter(target, inputs, rows, masks)[:, context_positions.shape[1] :]
        return hidden.view(*positions.shape, -1)[:, :, 1:]

    def _losses(self, hidden: Tensor, labels: Tensor, counts: Tensor, teacher: Mapping) -> Losses:
        head = self.target.head
        result = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]).to(head.dtype),
            head,
            labels.flatten(),
            self.slot_weights(counts).flatten(),
            reduction="none",
            max_rows=counts.numel(),  # nearly all rows count, and to know which ones, the host would have to wait
            softcap=self.target.softcap,
            **teacher,
        )
        losses = result.loss.view(counts.shape) * (1 + self.kl_weight)  # `_teacher` mixes parts whose sum is 1
        if self.gamma is None:
            weights = dpace if self.forwards == 2 else one_forward_dpace
            losses = losses * weights(result.nll.view(counts.shape), counts)
        return Losses(losses, counts, result.correct.view(counts.shape))

    def _teacher(self, batch: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Any]:
        mix = self.kl_weight / (1 + self.kl_weight)
        return self.teacher(batch, hidden, self.drafter.config.drafted, "kl", mix, self.target.head)


def _context_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """The position of every token of the context in its sample, int64 [B, S]."""
    if "context_positions" in batch:
        return batch["context_positions"]
    ids = batch["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
