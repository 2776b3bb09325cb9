"""What the objectives of all drafters share: the weights of drafted slots, and the target as a teacher of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models import Target
from ..anchors import position_decay
from ..parallel import Drafter
from ..tau import TauOfBlocks
from .objective import Objective


class DraftingObjective(Objective):
    """The losses of a drafter on a batch of ``AnchorCollator``: those of the K drafted slots of its blocks, [B, N, K].

    Args:
        gamma: the decay of `position_decay` (7, 5, 4 for blocks of 16, 10, 8 in the DFlash paper); None weights by
            D-PACE.
    """

    noun = "drafter"
    meter = TauOfBlocks

    def __init__(self, drafter: Drafter, target: Target, gamma: float | None):
        super().__init__(target)
        self.drafter, self.gamma = drafter, gamma

    @property
    def trained(self) -> Drafter:
        return self.drafter

    def drafter_to_decode(self) -> Drafter:
        """The drafter as it decodes after training: whole, and in the target's dtype. Every rank must call this."""
        raise NotImplementedError

    def labels(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The labels of the drafted slots, and which of them count: [B, N, K] each."""
        raise NotImplementedError

    def slot_weights(self, counts: Tensor) -> Tensor:
        """The weights of drafted slots [..., K] that are known before the forward pass."""
        if self.gamma is None:
            return counts.float()
        return counts * position_decay(counts.shape[-1], self.gamma, first_slot=0, device=counts.device)

    def divisor(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What a batch adds to the loss's divisor: the sum of its weights, or with D-PACE the number of its blocks."""
        return batch["keep"].sum() if self.gamma is None else self.slot_weights(self.labels(batch)[1]).sum()

    def teacher(
        self, batch: Mapping[str, Tensor], hidden: Tensor, drafted: int, kind: str, mix: float, head: Tensor
    ) -> dict[str, Any]:
        """The options of `linear_cross_entropy` for the target's distributions.

        The target predicts a token at the one before it: those of a block's slots from the anchor on.

        Args:
            hidden: the target's hidden states [B, S, H] of the clean text.
            drafted: K.
            kind, mix: `teacher_kind` and `teacher_mix`.
            head: the weight of the target's head, [V, H].
        """
        slots = torch.arange(drafted, device=hidden.device)
        columns = (batch["anchors"][:, :, None] + slots).clamp(max=hidden.shape[1] - 1)
        rows = columns + hidden.shape[1] * torch.arange(len(hidden), device=hidden.device)[:, None, None]
        return {
            "teacher_hidden": hidden.flatten(0, 1),
            "teacher_head": head,
            "teacher_row": rows.flatten(),
            "teacher_softcap": self.target.softcap,
            "teacher_kind": kind,
            "teacher_mix": mix,
        }
