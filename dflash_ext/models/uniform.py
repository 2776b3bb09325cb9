"""What turns a causal LM into a denoiser of uniform-state diffusion: as for masked diffusion, and self-conditioning."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..masks import IntervalMask
from ..ops import soft_embedding
from .adaptation import Adaptation, AdaptationConfig
from .full_weights import FullWeights
from .lora import LoraAdapter
from .target import Target

ROWS = 2048  # rows of logits that exist at a time


class SelfConditioning(nn.Module):
    """Adds to the embedding of a canvas what the step before expected there, through a gated MLP (DiffusionGemma).

    DiffusionGemma normalises the sum. Here the sum is the input of the layers, and the MLP's last product starts as
    zeros, so that a base that knows nothing of it begins with the embeddings that it was trained on. An expected
    embedding of zeros, as in a first step, adds nothing.

    Args:
        hidden_size, intermediate_size: of the embedding and of the MLP.
        eps: of the norm of the expected embedding.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.pre_norm = nn.Parameter(torch.ones(hidden_size))
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, embedded: Tensor, soft: Tensor) -> Tensor:
        """The input of the layers: embedded and soft are [B, L, H], as is the result, in the dtype of `embedded`."""
        normed = nn.functional.rms_norm(soft.to(self.pre_norm.dtype), self.pre_norm.shape, self.pre_norm, self.eps)
        update = self.down(nn.functional.gelu(self.gate(normed), approximate="tanh") * self.up(normed))
        return embedded + update.to(embedded.dtype)


class UniformAdaptation(Adaptation):
    """An `Adaptation` without a mask token: it reads random tokens in the place of noised ones.

    Attributes:
        self_conditioning: acts on the tokens of blocks alone; what comes before them has an expected embedding of zero.
    """

    def __init__(self, target: Target, config: AdaptationConfig, adapter: LoraAdapter | FullWeights):
        super().__init__(target, config, adapter)
        del self.mask_embedding
        width = target.embedding_size
        self.self_conditioning = SelfConditioning(width, 4 * width)
        self._soft: Tensor | None = None

    def begin(self) -> None:
        """There is no embedding of a mask."""

    @property
    def stand_in(self) -> int:
        return 0  # no token is masked

    def inputs(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, IntervalMask], Tensor | None]:
        """What `forward` takes for a batch of `UniformCollator`: noised blocks have their random tokens.

        Raises a ValueError for a batch of masked text.
        """
        if "noised" not in batch:
            raise ValueError("a denoiser of uniform noise has no mask token, and cannot fill in hidden tokens")
        ids, hidden, *others = super().inputs(batch)
        length = batch["input_ids"].shape[1]
        read = batch["input_ids"].where(~batch["noised"], batch["noise"])
        return torch.cat([read, ids[:, length:]], dim=1), torch.zeros_like(hidden), *others

    def of_denoiser(self) -> dict[str, Tensor | nn.Module]:
        conditioning = copy.deepcopy(self.self_conditioning).to(self.target.dtype)
        return {"self_conditioning": conditioning.requires_grad_(False)}

    @property
    def table(self) -> Tensor:
        """The table of the embedding that the layers read, without its scale, [V, H]."""
        return self.adapter.weight_of(self.target, self.target.model.get_input_embeddings())

    def embedded(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        soft = torch.zeros_like(embedded) if self._soft is None else self._soft
        return self.self_conditioning(embedded, soft)

    def conditioned(self, soft: Tensor | None, *inputs) -> Tensor:
        """As `forward`, with the expected embeddings [B, L, H] of the step before; None is a first step."""
        self._soft = soft
        try:
            return self(*inputs)
        finally:
            self._soft = None

    @torch.no_grad()
    def expected(self, states: Tensor, rows: Tensor) -> Tensor:
        """The expected embeddings [B, L, H] of a step's hidden states [B, L, H], zeros where `rows` (bool) is False."""
        target, head, table = self.target, self.head, self.table
        soft = states.new_zeros(states.shape)
        chosen = states[rows].to(head.dtype)
        found = [
            soft_embedding(nn.functional.linear(part, head), table, softcap=target.softcap)
            for part in chosen.split(ROWS)
        ]
        if found:
            soft[rows] = torch.cat(found).to(soft.dtype) * (target.embedding_scale or 1.0)
        return soft
