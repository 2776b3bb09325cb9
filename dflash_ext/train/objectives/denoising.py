"""The objective of masked denoising: the hidden tokens of each document's block (arXiv 2502.09992)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...models import Adaptation
from ...ops import linear_cross_entropy
from ..losses import Losses
from .objective import Objective


class DenoisingObjective(Objective):
    """The losses of a denoiser on a batch of ``NoiseCollator``: [B, S].

    The logits of a hidden token's own position are compared with the token; there is no shift. The loss of a step is
    the weighted sum over all hidden tokens, divided by the sum of what they weigh, over all batches and ranks: by their
    number, or with weights of 1 / p by the number of tokens in blocks. No logits of other tokens are computed.

    Args:
        adaptation: what is trained, in float32; the base stays as it is.
        ar_weight: adds this times the mean cross-entropy of the next token, with the adapter, over the right tokens of
            a row that see none but right ones before them: its prefixes, or all with the pattern block_causal. It keeps
            what the base could do.
        kl_weight: adds this times the divergence from the base's own distribution of a hidden token, which it predicts
            one position earlier on the right text under a causal mask.

    Raises:
        ValueError: the base's logits are not the product of its hidden states and its head; a weight is negative; or
            right tokens see later ones or are left to the base, so that they cannot learn to predict the next one.
    """

    noun = "denoiser"

    def __init__(self, adaptation: Adaptation, *, ar_weight: float = 0.0, kl_weight: float = 0.0):
        super().__init__(adaptation.target)
        self.target.check_head()
        for name, weight in (("ar_weight", ar_weight), ("kl_weight", kl_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} is {weight}: a number of at least 0 is needed")
        if ar_weight and adaptation.config.context == "block_causal":
            raise ValueError("the loss of the next token needs a causal context: in a block_causal one it is seen")
        if ar_weight and adaptation.config.kind == "gated":
            raise ValueError("with a gated adapter the base itself reads right tokens: ar_weight must be 0")
        self.adaptation, self.ar_weight, self.kl_weight = adaptation, ar_weight, kl_weight
        self.waits = ar_weight > 0  # for the number of tokens that follow right ones

    @property
    def trained(self) -> Adaptation:
        return self.adaptation

    def identity(self) -> dict[str, Any]:
        return asdict(self.adaptation.config) | self.adaptation.adapter.settings

    def options(self) -> dict[str, Any]:
        return {"ar_weight": self.ar_weight, "kl_weight": self.kl_weight}

    def of_target(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (self.adaptation.base_states(batch),) if self.kl_weight else ()

    def forward(self, batch: Mapping[str, Tensor], base_states: Tensor | None = None) -> Losses:
        """Runs the denoiser once.

        Args:
            base_states: [B, S, H], as from `Adaptation.base_states`, if the divergence from the base counts.
        """
        ids, hidden = batch["input_ids"], batch["hidden"]
        states = self.adaptation(*self.adaptation.inputs(batch))
        options = {"max_rows": batch["room"].numel()} | self._teacher(base_states)
        result = self._cross_entropy(states[:, : ids.shape[1]], ids, batch["weights"], **options)
        losses = result.loss * (1 + self.kl_weight)
        if self.ar_weight:
            losses = losses + self._next_tokens(states[:, -ids.shape[1] :], batch)
        return Losses(losses, hidden, result.correct)

    def divisor(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["weights"].sum()

    def _cross_entropy(self, states: Tensor, labels: Tensor, weights: Tensor, **options):
        head = self.adaptation.head
        return linear_cross_entropy(
            states.to(head.dtype),
            head,
            labels,
            weights,
            reduction="none",
            softcap=self.target.softcap,
            **options,
        )

    def _teacher(self, base_states: Tensor | None) -> dict[str, Any]:
        """The options of `linear_cross_entropy` for the base's distributions.

        Its mean of cross-entropy and divergence, times 1 + kl_weight, is the cross-entropy plus kl_weight times the
        divergence.
        """
        if not self.kl_weight:
            return {}
        batch, length = base_states.shape[:2]
        # A document's first token is never hidden, so that a hidden one has a row before it.
        before = (torch.arange(batch * length, device=base_states.device) - 1).clamp(min=0).view(batch, length)
        return {
            "teacher_hidden": base_states,
            "teacher_head": self.target.head,
            "teacher_row": before,
            "teacher_softcap": self.target.softcap,
            "teacher_kind": "kl",
            "teacher_mix": self.kl_weight / (1 + self.kl_weight),
        }

    def _next_tokens(self, states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The weighted losses [B, S] of the tokens that follow right ones; a row's weights add up to `ar_weight` times
        what its hidden tokens weigh."""
        ids = batch["input_ids"]
        column = torch.arange(ids.shape[1], device=ids.device)
        counts = column + 1 < batch["ends"]
        if self.adaptation.config.pattern != "block_causal":
            counts &= column < batch["blocks"]
        share = batch["weights"].sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp(min=1)
        return self._cross_entropy(states, ids.roll(-1, dims=1), counts * share * self.ar_weight).loss
