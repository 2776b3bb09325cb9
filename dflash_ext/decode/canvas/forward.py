"""The forward of a denoiser: it reads tokens into the cache, and gives the logits of canvases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models import Denoiser, DFlashDrafter, Target, is_diffusion_gemma
from ..forward import target_forward
from ..forward.masks import Masks, block_masks, causal_masks
from .diffusion_gemma import DiffusionGemmaForward
from .first_guess import FirstGuess


class CanvasForward(Protocol):
    """What the canvas loop needs of a model.

    Its methods take tokens [B, R], their positions (int64 [B, R], -1 for tokens that do not exist), how many tokens are
    in the cache before them (`start`, int64 [B]), how many of them exist (`counts`, int64 [B]), and the slots of the
    cache (int32 [B]). They read no host value.

    mask_id: the mask token; None if there is none.
    self_conditions: whether a step's logits are an input of the next one.
    like: the embedding's weight, [V, H].
    softcap: what is left to apply to the logits of `denoise`: ``softcap * tanh(logits / softcap)``; None for nothing.
    first_guess: drafts canvases, which then begin with its tokens instead of noise; None if nothing does.
    """

    mask_id: int | None
    self_conditions: bool
    like: Tensor
    softcap: float | None
    first_guess: FirstGuess | None

    def encode(self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> None:
        """Reads tokens of prompts into the cache."""

    def commit(self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> None:
        """Reads finished canvases into the cache, in the form in which training saw a prefix."""

    def denoise(
        self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor, soft: Tensor | None
    ) -> Tensor:
        """The logits [B, R, V] of canvases, before `softcap`. What the cache has behind `start` is overwritten.

        soft: what `condition` returned for the step before, [B, R, H]; zeros in the first step.
        """

    def condition(self, expected: Tensor) -> Tensor:
        """What conditions a step on the one before, whose expected embeddings, by `like`, are [B, R, H]."""


class CausalForward:
    """The forward of a `Denoiser`. What reads prompts and what denoises keep their keys and values in one cache.

    Args:
        slots, tokens, rows: as in `LeanForward`.
    """

    softcap = None

    def __init__(self, denoiser: Denoiser, *, slots: int, tokens: int, rows: int):
        self.denoiser, self.target = denoiser, denoiser.target
        self.target.check_length(tokens, f"rows of {tokens} tokens")
        self.forward = self.encoder = target_forward(self.target, slots=slots, tokens=tokens, rows=rows)
        if denoiser.encoder is not None:
            self.encoder = target_forward(denoiser.encoder, slots=1, tokens=tokens, rows=rows)
            self.encoder.cache = self.forward.cache
        self.embedding = self.target.model.get_input_embeddings()
        self.like = self.embedding.weight
        self.first_guess: FirstGuess | None = None
        self.mask_id, self.self_conditions = denoiser.mask_id, denoiser.self_conditioning is not None
        self.block = block_masks if denoiser.attention == "bidirectional" else causal_masks
        self.committed = block_masks if denoiser.prefix == "block_causal" else causal_masks

    def encode(self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> None:
        self._keep(tokens, positions, start, counts, slots, causal_masks)

    def commit(self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> None:
        self._keep(tokens, positions, start, counts, slots, self.committed)

    def guess(self, drafter: DFlashDrafter, *, length: int, slots: int, tokens: int) -> None:
        """Lets a drafter draft canvases, as `FirstGuess` does."""
        self.encoder.target = Target(self.denoiser.reader.model, drafter.config.target_layer_ids)
        self.first_guess = FirstGuess(drafter, self.encoder.target, length=length, slots=slots, tokens=tokens)

    def _keep(
        self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor, masks: Masks
    ) -> None:
        taps = self.encoder.target.tap_ids if self.first_guess else ()
        features = self.encoder.read(tokens, positions, start, counts, slots, taps, ends=(), masks=masks)[1]
        if self.first_guess:
            self.first_guess.read(tokens, features, positions, slots)

    def denoise(
        self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor, soft: Tensor | None
    ) -> Tensor:
        is_masked = tokens == self.mask_id if self.mask_id is not None else None
        if is_masked is not None:
            tokens = tokens.masked_fill(is_masked, self.denoiser.stand_in)
        with self._embedded(is_masked, soft):
            return self.forward.read(tokens, positions, start, counts, slots, masks=self.block)[0]

    def condition(self, expected: Tensor) -> Tensor:
        return expected * (self.target.embedding_scale or 1.0)

    @contextmanager
    def _embedded(self, is_masked: Tensor | None, soft: Tensor | None) -> Iterator[None]:
        """Replaces the output of the model's embedding: masked positions, then self-conditioning."""

        def changed(module, args, embedded: Tensor) -> Tensor:
            denoiser = self.denoiser
            if denoiser.mask_embedding is not None:
                embedded = torch.where(is_masked.unsqueeze(-1), denoiser.mask_embedding.to(embedded.dtype), embedded)
            return denoiser.self_conditioning(embedded, soft) if denoiser.self_conditioning else embedded

        handle = self.embedding.register_forward_hook(changed)
        try:
            yield
        finally:
            handle.remove()


def canvas_forward(
    model: Denoiser | PreTrainedModel, *, slots: int, tokens: int, rows: int, fused: bool = True
) -> CanvasForward:
    """The forward of a denoiser or of a DiffusionGemma; the sizes are those of `LeanForward`.

    fused: as in `DiffusionGemmaForward`.

    Raises:
        ValueError: the model is neither of these, or rows of so many tokens do not fit.
    """
    if isinstance(model, Denoiser):
        return CausalForward(model, slots=slots, tokens=tokens, rows=rows)
    if is_diffusion_gemma(model):
        return DiffusionGemmaForward(model, slots=slots, tokens=tokens, rows=rows, fused=fused)
    raise ValueError(
        f"{type(model).__name__} cannot decode canvases; a Denoiser or DiffusionGemmaForBlockDiffusion is needed"
    )
