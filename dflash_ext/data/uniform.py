"""Batches of text in which some tokens of each document's block are random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import MaskNoise, Share
from .fingerprints import generator
from .noised import NoiseCollator

SELF_CONDITIONED = 0.5  # the share of rows that are read twice


@dataclass(frozen=True)
class UniformCollator(NoiseCollator):
    """Draws prefixes and random tokens of the rows of a `TextDataset`, as `NoiseCollator` draws hidden ones.

    Batches hold the same entries. "hidden" are all tokens of denoising blocks, which are the labels, and all of them
    weigh 1, unless there is a decay. And they hold:

    - "noised": bool [B, S], the tokens in whose place a random one is read.
    - "noise": int64 [B, S], random tokens of the whole vocabulary.
    - "conditioned": bool [B], the rows that are conditioned on a first pass.

    Attributes:
        noise: how many tokens of a block are noised; by default a share drawn uniformly between 0.001 and 1.
        vocab_size: of the random tokens.
        decay: the i-th token of a block weighs exp(-i / decay), as in DFlash's training; None weighs all alike.
    """

    noise: MaskNoise = MaskNoise(Share(1e-3, 1.0))
    vocab_size: int = 0
    decay: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}: random tokens need a vocabulary")
        if self.decay is not None and not self.decay > 0:
            raise ValueError(f"decay is {self.decay}: a number above 0 is needed")
        if self.complementary or self.inverse_rate:
            raise ValueError("with uniform noise all tokens of a block count: there are no complements and no rates")

    def _rows(self, sample: Mapping) -> list[dict[str, Tensor]]:
        key = sample.get("key")
        draws = None if key is None else generator("random tokens", *key)
        [row] = super()._rows(sample)
        length = len(row["input_ids"])
        place = torch.arange(length) - row["blocks"]
        in_block = place >= 0
        weights = in_block.float()
        if self.decay is not None:
            weights *= torch.exp(-(place % (self.block_size or length)) / self.decay)
        return [
            row
            | {
                "hidden": in_block,
                "weights": weights,
                "noised": row["hidden"],
                "noise": torch.randint(self.vocab_size, (length,), generator=draws),
                "conditioned": torch.rand((), generator=draws) < SELF_CONDITIONED,
            }
        ]
