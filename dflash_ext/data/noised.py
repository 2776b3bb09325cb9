"""Batches of noised text: where each document's denoising block starts, and which of its tokens are hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import MaskNoise, Share
from .errors import DataError
from .fingerprints import generator
from .text import TextDataset

SHORTEST = 4  # tokens of a document that has a block to denoise
ROOMS = 32  # how many sizes "room" may have


def check_blocks(text: TextDataset) -> None:
    """Raises DataError if no document of `text` is long enough to have a block to denoise."""
    if text.longest < SHORTEST:
        raise DataError(
            f"{text.source}: there is nothing to denoise, since no document has {SHORTEST} tokens or more in a row"
        )


@dataclass(frozen=True)
class NoiseCollator:
    """Draws prefixes and hidden tokens of the rows of a `TextDataset`.

    Each document of a row has a prefix, which stays as it is, and a denoising block behind it, in which tokens are
    hidden. A document of less than `SHORTEST` tokens is all prefix. Samples of answers say in "prefixes" how many of a
    document's tokens are its prompt, which is then its prefix.

    Samples may have an entry "key", a tuple (seed, step, index) from which everything drawn for them follows. Nothing
    depends on who sees whom, so that causal and bidirectional denoisers train on the same batches.

    Batches hold, each [B, S]:

    - "input_ids": int64, the right tokens, the hidden ones included.
    - "hidden": bool, the hidden tokens, which are the labels.
    - "starts", "ends", "blocks": int32, the columns at which each token's document starts, ends (exclusively) and has
      its denoising block. Where there is no block, "blocks" is "ends".
    - "weights": float32, what the loss of a hidden token counts; 0 for the others.

    And "room": bool [B, R], where B * R is the number of hidden tokens, rounded up. Its shape bounds their number for
    those who may not wait for a device, and has few different sizes.

    Attributes:
        prefix: the share of a document that is its prefix, unless samples say so. At least one token is.
        block_size: noise is drawn for this number of tokens at a time; None draws it for the whole rest of a document.
        complementary: every sample gives two rows. The second one hides those tokens of the blocks that the first one
            shows, so that their rates are p and 1 - p (Fast-dLLM v2, arXiv 2509.26328).
        inverse_rate: a hidden token weighs 1 / p, p being the hidden share of its block, which makes the loss a bound
            on the likelihood of the text (arXiv 2406.07524). Otherwise every hidden token weighs 1.

    Raises:
        ValueError: the share of the prefix may be 1.
    """

    noise: MaskNoise = MaskNoise(span=3)
    prefix: Share = Share(0.5, 0.5)
    block_size: int | None = None
    complementary: bool = False
    inverse_rate: bool = False

    def __post_init__(self):
        if self.prefix.high == 1:
            raise ValueError(f"a prefix of {self.prefix} leaves no token to denoise: a share below 1 is needed")

    def __call__(self, samples: list[Mapping]) -> dict[str, Tensor]:
        rows = [row for sample in samples for row in self._rows(sample)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        size = math.ceil(len(rows[0]["hidden"]) / ROOMS)
        needed = max(math.ceil(int(batch["hidden"].sum()) / (len(rows) * size)), 1)
        return batch | {"room": torch.ones(len(rows), needed * size, dtype=torch.bool)}

    def _rows(self, sample: Mapping) -> list[dict[str, Tensor]]:
        ids, key, given = sample["input_ids"], sample.get("key"), sample.get("prefixes")
        draws = None if key is None else generator("noise", *key)
        starts = torch.cat([sample["starts"], torch.tensor([len(ids)])])
        lengths = starts.diff()
        hidden, rates = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids))
        prefixes = lengths.clone()
        for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=False)):
            if length < SHORTEST:
                continue
            if given is None:
                prefix = min(max(round(self.prefix.draw(draws) * length), 1), length - 1)
            else:
                prefix = min(max(int(given[number]), 1), length)
            prefixes[number] = prefix
            size = self.block_size or length
            for first in range(start + prefix, start + length, size):
                block = slice(first, min(first + size, start + length))
                hidden[block] = self.noise.draw(block.stop - block.start, draws)
                rates[block] = hidden[block].float().mean()
        bounds = {"starts": starts[:-1], "ends": starts[1:], "blocks": starts[:-1] + prefixes}
        row = {name: of.repeat_interleave(lengths).int() for name, of in bounds.items()} | {"input_ids": ids}
        in_block = torch.arange(len(ids)) >= row["blocks"]
        pairs = [(hidden, rates), (in_block & ~hidden, 1 - rates)] if self.complementary else [(hidden, rates)]
        return [row | {"hidden": mask, "weights": self._weights(mask, rate)} for mask, rate in pairs]

    def _weights(self, hidden: Tensor, rates: Tensor) -> Tensor:
        return torch.where(hidden, 1 / rates if self.inverse_rate else 1.0, 0.0)
