"""A causal LM that fills blocks of tokens by diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .target import Target

ATTENTION = ("bidirectional", "causal")
PREFIX = ("causal", "block_causal")


@dataclass(frozen=True)
class Denoiser:
    """A causal LM whose logits at a position predict the token at that position, and how it was trained to do so.

    Attributes:
        target: the model, with an adapter on it or merged into it.
        mask_id: the token that stands for a masked position. With an embedding of its own it may be the first number
            behind the vocabulary. None is for uniform-state diffusion, which has no such token.
        mask_embedding: ``[H]``, the input embedding of masked positions, after any scale of the model's embedding. None
            is the row of the model's own table.
        attention: whether the rows of a block see all of their block ("bidirectional") or only what is before them
            ("causal").
        prefix: whether a committed block is read again causally ("causal"), or in both directions within itself
            ("block_causal"). A prompt is always causal.
        self_conditioning: for uniform-state diffusion, a module that takes the embedded canvas ``[B, L, H]`` and the
            expected embeddings of the step before ``[B, L, H]`` (zeros in the first step) and returns the input of the
            layers ``[B, L, H]``, as that of DiffusionGemma does.
        encoder: another model of the same shapes, which reads prompts and committed blocks; `target` denoises over its
            keys and values. None: `target` reads them, too.

    Raises:
        ValueError: attention or prefix has another value, or the mask token is not in the vocabulary.
    """

    target: Target
    mask_id: int | None = None
    mask_embedding: Tensor | None = None
    attention: str = "bidirectional"
    prefix: str = "causal"
    self_conditioning: nn.Module | None = None
    encoder: Target | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("attention", self.attention, ATTENTION), ("prefix", self.prefix, PREFIX)):
            if value not in known:
                raise ValueError(f"Denoiser: {name} is {value!r}; {' and '.join(known)} are supported")
        known = self.target.vocab_size + (self.mask_embedding is not None)
        if self.mask_id is not None and not 0 <= self.mask_id < known:
            raise ValueError(f"Denoiser: the mask token is {self.mask_id}; {known} tokens have an embedding")

    @property
    def reader(self) -> Target:
        """The model that reads prompts and committed blocks."""
        return self.encoder or self.target

    @property
    def stand_in(self) -> int:
        """The token that the model reads at masked positions. Gemma 4 embeds tokens in each layer, too."""
        return self.mask_id if self.mask_id < self.target.vocab_size else 0
