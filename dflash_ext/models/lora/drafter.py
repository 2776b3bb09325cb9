"""A LoRA drafter: with its adapter a language model drafts a block for itself in one pass, without it it verifies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ...masks import IntervalMask
from ..target import Target
from .adapter import LoraAdapter
from .config import LoraDrafterConfig, identity_of
from .rows import States, recomputed, run_rows
from .sampler import SamplerHead
from .split import local


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
        base: the base, where another model verifies what a whole drafter drafts. None: the base verifies.
    """

    def __init__(self, config: LoraDrafterConfig, adapter: LoraAdapter):
        super().__init__()
        self.config, self.adapter = config, adapter
        self.base: Target | None = None
        size = config.base["hidden_size"]
        self.mask_embedding = nn.Parameter(torch.zeros(size))
        self.sampler = SamplerHead(size, config.sampler_width) if config.sampler_width else None
        self.recomputes = False  # whether the backward computes the base's layers again

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
            mean = target.embedding.float().mean(dim=0)
            drafter.mask_embedding.copy_(mean * (target.embedding_scale or 1.0))
        return drafter

    def check_verifier(self, target: Target) -> None:
        """Raises a ValueError unless what this drafter drafts can be verified by `target`: by its base or, for a whole
        drafter that has its `base` with it, by a model of the same vocabulary and dtype on the same device."""
        self.config.check_target(self.base or target)
        if self.base is None:
            return
        if self.config.kind != "whole":
            raise ValueError("a gated LoRA drafter reads its base's cache, so that no other model can verify")
        for name in ("vocab_size", "dtype", "device"):
            own, verifiers = getattr(self.base, name), getattr(target, name)
            if own != verifiers:
                raise ValueError(f"the {name} of the LoRA drafter's base is {own}, that of the verifier {verifiers}")

    def new_like(self) -> LoraDrafter:
        """A new drafter of the same shapes, in float32 on the CPU."""
        adapter = self.adapter
        return LoraDrafter(self.config, LoraAdapter(adapter.shapes, adapter.rank, adapter.alpha))

    @torch.no_grad()
    def start_from(self, other: LoraDrafter) -> None:
        """Takes over the updates of another drafter's adapter (`LoraAdapter.start_from`), its mask embedding and, where
        both have one of the same width, its sampler head.

        Raises:
            ValueError: the other drafter is of another kind, or a linear layer that both adapt is of another shape.
        """
        if other.config.kind != self.config.kind:
            raise ValueError(f"the drafter to start from is {other.config.kind}, the new one {self.config.kind}")
        self.adapter.start_from(other.adapter)
        self.mask_embedding.copy_(other.mask_embedding)
        if self.sampler is not None and other.config.sampler_width == self.config.sampler_width:
            self.sampler.load_state_dict(other.sampler.state_dict())

    @property
    def dtype(self) -> torch.dtype:
        return self.mask_embedding.dtype

    def embed(self, target: Target, ids: Tensor) -> Tensor:
        """The inputs of the base's layers for tokens: [...] -> [..., H], the drafter's own for the mask token."""
        embedded = target.model.get_input_embeddings()(ids)
        is_mask = (ids == self.config.mask_token_id).unsqueeze(-1)
        return torch.where(is_mask, local(self.mask_embedding).to(embedded.dtype), embedded)

    def context_masks(self, target: Target, positions: Tensor) -> dict[str, IntervalMask]:
        """The causal masks, by kind of layer, of a context whose tokens are at these positions of their samples.

        positions: int64 [B, S]. A row may hold several samples, one behind the other.
        """
        none = positions[:, :0]
        return self._masks(target, positions, none, none.bool(), block_size=1, include_context=True)

    def anchor_masks(self, target: Target, positions: Tensor, anchors: Tensor, keep: Tensor) -> dict[str, IntervalMask]:
        """What the rows of training blocks see, by kind of layer.

        Args:
            positions: int64 [B, S], as in `context_masks`. The context's keys come first.
            anchors, keep: int64 and bool [B, N], the columns of the anchors and which of them there are.

        Returns:
            Masks of the N * `drafted` mask rows of a gated drafter, and of the S + N * `block_size` rows of a whole
            one, its context's rows being the first.
        """
        if self.config.kind == "whole":
            size = self.config.block_size
            return self._masks(target, positions, anchors, keep, block_size=size, include_context=True)
        # A gated block sees its anchor as a token of the context. For the mask, its first row is the anchor.
        return self._masks(target, positions, anchors + 1, keep, block_size=self.config.drafted)

    def _masks(
        self,
        target: Target,
        positions: Tensor,
        anchors: Tensor,
        keep: Tensor,
        *,
        block_size: int,
        include_context: bool = False,
    ) -> dict[str, IntervalMask]:
        length = positions.shape[1]
        starts = torch.arange(length, device=positions.device) - positions  # where each token's sample starts
        blocks = partial(
            IntervalMask.anchor_blocks,
            length,
            anchors,
            block_size,
            keep=keep,
            context_start=starts if include_context else starts.gather(1, anchors),
            convention="zlab",
            causal=self.config.causal,
            include_context=include_context,
        )
        return {kind: blocks(window=window) for kind, window in target.windows.items()}

    def forward(
        self,
        target: Target,
        inputs: Tensor,
        positions: Tensor,
        masks: Mapping[str, IntervalMask],
        context: States | None = None,
    ) -> Tensor:
        """Runs rows with the adapter, whatever their kind: hidden states [B, Q, H] to which the base's head is applied.

        Args:
            inputs: [B, Q, H], as from `embed`.
            positions: int64 [B, Q].
            masks: by kind of layer.
            context: keys and values that the rows see before their own, as from `read_context`.
        """
        with ExitStack() as acting:
            acting.enter_context(self.adapter.applied(target.model))
            if self.recomputes:
                acting.enter_context(recomputed(target))
            return run_rows(target, inputs, positions, masks, context)

    def gradient_checkpointing_enable(self, **_) -> None:
        """Makes each layer of the base compute its results again in the backward."""
        self.recomputes = True

    activation_checkpointing_enable = gradient_checkpointing_enable  # the name from transformers 5.24 on
