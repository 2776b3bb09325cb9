"""The random numbers of canvases: the noise, and the draws of each step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...ops import sample, sample_and_embed, soft_embedding
from ...ops.random import advanced, uniform_tokens
from ...reference import Sample
from ...reference.numerics import softcapped
from .rows import Rows


class Randomness(Protocol):
    def noise(self, rows: Rows, vocab_size: int) -> Tensor:
        """Uniform tokens for every position of the canvases, int64 [N, L]."""

    def sample(self, logits: Tensor, rows: Rows, **options) -> Sample | tuple[Sample, Tensor]:
        """Draws from logits [N, L, V]; the options and what is returned are those of `ops.sample`."""

    def sample_and_embed(self, logits: Tensor, embedding: Tensor, rows: Rows, **options) -> tuple[Sample, Tensor]:
        """The same with what `ops.sample_and_embed` takes and returns."""


class Seeded:
    """Every random number follows from a row's seed, its position in the row and the step on its canvas.

    So a row's tokens depend neither on the other rows nor on its slot.
    """

    def noise(self, rows: Rows, vocab_size: int) -> Tensor:
        return uniform_tokens(self._seeds(rows), vocab_size)

    def sample(self, logits: Tensor, rows: Rows, **options) -> Sample | tuple[Sample, Tensor]:
        return sample(logits, self._seeds(rows), **options)

    def sample_and_embed(self, logits: Tensor, embedding: Tensor, rows: Rows, **options) -> tuple[Sample, Tensor]:
        return sample_and_embed(logits, embedding, self._seeds(rows), **options)

    def _seeds(self, rows: Rows) -> Tensor:
        return advanced(rows.seed, rows.step)[:, None] + rows.positions


class LikeTransformers:
    """Takes random numbers from torch's default generator in the order in which transformers' `generate` does.

    DiffusionGemma's canvases are then the same ones at the same `torch.manual_seed`, as long as a batch stays together.
    """

    def noise(self, rows: Rows, vocab_size: int) -> Tensor:
        return torch.randint(0, vocab_size, rows.canvas.shape, device=rows.canvas.device)

    def sample(self, logits: Tensor, rows: Rows, **options) -> Sample:
        drawn = sample(logits, 0, **options)
        temperature = torch.as_tensor(options["temperature"], device=logits.device)
        logits = softcapped(logits.float(), options["softcap"])
        probabilities = torch.softmax(logits / temperature[..., None], dim=-1)
        tokens = torch.multinomial(probabilities.flatten(0, -2), 1).view(drawn.token.shape)
        return drawn._replace(token=tokens)

    def sample_and_embed(self, logits: Tensor, embedding: Tensor, rows: Rows, **options) -> tuple[Sample, Tensor]:
        return self.sample(logits, rows, **options), soft_embedding(logits, embedding, **options)
