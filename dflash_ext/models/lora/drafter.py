"""A LoRA drafter: with its adapter a language model drafts a block for itself in one pass, without it it verifies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..target import Target
from .adapter import LoraAdapter
from .config import LoraDrafterConfig, identity_of
from .sampler import SamplerHead


class LoraDrafter(nn.Module):
    """The trained parts of a LoRA drafter: an adapter, the embedding of the mask token and an optional sampler head.

    The base is no part of it. What its rows see, and where they stand, is the same in training and in decoding. A block
    has the anchor, a committed token at position a, and mask rows at a + 1, ..., a + `config.drafted`. The row at a + j
    predicts the token at a + j.

    - Gated (I-DLM, arXiv 2604.11035; arXiv 2507.11851): the adapter acts on the mask rows alone. They see the base's
      own keys and values up to and with the anchor, and each other.
    - Whole: the adapter acts on every row, the context's too. A block is the anchor's row and the mask rows. They see
      the context before the anchor and each other.

    Attributes:
        mask_embedding: [H], as the base's first layer takes it, so that a scale of the base's embedding is already in
            it. It is no row of the base's table: where weights are tied, that would change the head.
    """

    def __init__(self, config: LoraDrafterConfig, adapter: LoraAdapter):
        super().__init__()
        self.config, self.adapter = config, adapter
        size = config.base["hidden_size"]
        self.mask_embedding = nn.Parameter(torch.zeros(size))
        self.sampler = SamplerHead(size, config.sampler_width) if config.sampler_width else None

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        mask_token_id: int,
        rank: int = 64,
        alpha: float | None = None,
        targets: str | Sequence[str] = "all",
        **settings,
    ) -> LoraDrafter:
        """A new drafter in float32 on the CPU, whose mask embedding is the mean of the base's embeddings.

        Args:
            rank, alpha, targets: as in `LoraAdapter.for_target`.
            settings: `kind`, `block_size`, `causal` and `sampler_width` of `LoraDrafterConfig`.
        """
        config = LoraDrafterConfig(identity_of(target), mask_token_id, **settings)
        drafter = cls(config, LoraAdapter.for_target(target, targets=targets, rank=rank, alpha=alpha))
        with torch.no_grad():
            mean = target.model.get_input_embeddings().weight.float().mean(dim=0)
            drafter.mask_embedding.copy_(mean * (target.embedding_scale or 1.0))
        return drafter

    @property
    def dtype(self) -> torch.dtype:
        return self.mask_embedding.dtype

    def embed(self, target: Target, ids: Tensor) -> Tensor:
        """The inputs of the base's layers for tokens: [...] -> [..., H], the drafter's own for the mask token."""
        embedded = target.model.get_input_embeddings()(ids)
        is_mask = (ids == self.config.mask_token_id).unsqueeze(-1)
        return torch.where(is_mask, self.mask_embedding.to(embedded.dtype), embedded)
