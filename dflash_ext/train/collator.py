"""Makes batches of blocks from samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .anchors import Blocks, build_blocks, fixed_anchors, sample_anchors
from .randomness import generator
from .tau import commit_limits

PER_TOKEN = {"input_ids", "context_positions", "features"}  # the entries of a batch that have a row for each token


@dataclass
class AnchorCollator:
    """Draws the anchors of samples, makes their blocks, and puts the samples into rows that are padded on the right.

    Samples are {"input_ids": int64 [S], "loss_mask": bool [S]}, with optional entries:

    - "key": a tuple (seed, step, index) from which the sample's anchors follow, whatever else is in the batch. Without
      it they are drawn from torch's global generator.
    - "cut": True if the answer goes on beyond the end of `input_ids`.
    - "features": the target's context features [S, taps * H], which are then in the batch, too.

    Batches hold `input_ids` [B, S], `anchors` and `keep` [B, N], the fields of `Blocks` [B, N, block_size], and
    `limits` [B, N], the tokens that a cycle could commit (`commit_limits`). Rows of several samples also have
    `context_positions` [B, S], the position of each token in its sample, and `context_start` [B, N], the column at
    which the sample of an anchor starts. A block and its labels are those of its sample alone, wherever it stands.

    Attributes:
        num_anchors: the number of blocks drawn from each sample.
        first_slot: the drafter's `config.first_draft_slot`.
        noise_ratio: the share of blocks whose drafted slots all hold the mask token. The others show the right tokens
            of a random number of leading slots, as a later step of denoising sees them; these do not count. Below 1,
            batches have `revealed` [B, N], that number.
        random_tokens: the size of the vocabulary from which random tokens are drawn, which stand in the place of mask
            tokens (`DFlashConfig.noise`); 0 for mask tokens. With random tokens, blocks beyond the `noise_ratio` show
            the right tokens of a random share of their slots, and all slots count, because the drafter has to find out
            which ones are right.
        slot_noise: the share of drafted slots that hold the mask token. Each of the others, drawn one by one, shows its
            right token and does not count.
        context_ratio: the share of each sample that is context alone and has no anchor; a pair (least, most) draws it
            for each sample.
        fixed: the anchors stand side by side (`fixed_anchors`) instead of being drawn.
        block_sizes: the sizes of blocks in a curriculum, such as (4, 8, 16), each for an equal part of `steps`. The
            slots beyond the size do not count. It is for samples whose "key" has a step.
        steps: those of the run.
        pack_length: samples share rows of at most this number of tokens, or of one sample that is longer. None gives
            each sample a row of its own.
        multiple_of: rows are padded to a multiple of this number of tokens, so that batches have few shapes.
    """

    num_anchors: int
    block_size: int
    mask_token_id: int
    first_slot: int = 1
    noise_ratio: float = 1.0
    slot_noise: float = 1.0
    random_tokens: int = 0
    context_ratio: float | tuple[float, float] = 0.0
    fixed: bool = False
    block_sizes: Sequence[int] = ()
    steps: int = 1
    pack_length: int | None = None
    multiple_of: int = 1

    def __call__(self, samples: list[Mapping]) -> dict[str, Tensor]:
        made = [self._of_sample(sample) for sample in samples]
        if self.pack_length is None:
            rows = made
        else:
            shares = shared_rows([len(each["input_ids"]) for each in made], self.pack_length)
            rows = [_joined([made[index] for index in share]) for share in shares]
        missing = -max(len(row["input_ids"]) for row in rows) % self.multiple_of
        if missing:
            longest = max(rows, key=lambda row: len(row["input_ids"]))
            for name in PER_TOKEN & longest.keys():
                longest[name] = torch.cat([longest[name], longest[name].new_zeros(missing, *longest[name].shape[1:])])
        return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}

    def _of_sample(self, sample: Mapping) -> dict[str, Tensor]:
        """The entries of a sample in a row of its own, without the dimension of rows."""
        ids, mask, key = sample["input_ids"][None], sample["loss_mask"][None], sample.get("key")
        anchors, keep = self._anchors(mask, key)
        size = self._size(key)
        drafted = size - self.first_slot
        limits = commit_limits(mask, anchors, keep, drafted, is_cut=sample.get("cut", False))
        blocks = build_blocks(
            ids,
            mask,
            anchors,
            keep,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            first_slot=self.first_slot,
        )
        blocks.counts[:, :, size:] = False
        given = {"features": sample["features"][None]} if "features" in sample else {}
        made = given | {"input_ids": ids, "anchors": anchors, "keep": keep, "limits": limits, **vars(blocks)}
        if self.random_tokens:
            shown = self._replace(ids, blocks, key and generator("noise", *key))
            made["limits"] = limits.masked_fill(shown, 0)
        elif self.noise_ratio < 1:
            made["revealed"] = self._reveal(ids, blocks, key and generator("noise", *key))
            made["limits"] = limits.masked_fill(made["revealed"] > 0, 0)
        if self.slot_noise < 1:
            draws = torch.rand(blocks.counts.shape, generator=key and generator("slots", *key))
            shown = blocks.counts & (draws >= self.slot_noise)
            self._show(ids, blocks, shown)
            blocks.counts[shown] = False
            made["limits"] = made["limits"].masked_fill(shown.any(dim=-1), 0)
        return {name: value[0] for name, value in made.items()}

    def _anchors(self, mask: Tensor, key: tuple | None) -> tuple[Tensor, Tensor]:
        if self.context_ratio:
            least, most = self.context_ratio if isinstance(self.context_ratio, tuple) else (self.context_ratio,) * 2
            share = least + (most - least) * torch.rand(1, generator=key and generator("context", *key))
            mask = mask & (torch.arange(mask.shape[1]) >= share * mask.shape[1])
        if self.fixed:
            return fixed_anchors(mask, self.num_anchors, self.block_size)
        return sample_anchors(mask, self.num_anchors, key and generator("anchors", *key))

    def _size(self, key: tuple | None) -> int:
        """The slots of the blocks in a sample's step."""
        if not self.block_sizes or key is None or not isinstance(key[1], int):
            return self.block_size
        return self.block_sizes[min(key[1] * len(self.block_sizes) // self.steps, len(self.block_sizes) - 1)]

    def _reveal(self, ids: Tensor, blocks: Blocks, generator: torch.Generator | None) -> Tensor:
        """Puts right tokens into leading slots of `blocks`. Returns how many drafted tokens each one shows: [1, N]."""
        labels = blocks.counts.sum(dim=-1)
        shown = 1 + (torch.rand(labels.shape, generator=generator) * (labels - 1)).long()
        is_noise = torch.rand(labels.shape, generator=generator) < self.noise_ratio
        revealed = shown.masked_fill(is_noise | (labels < 2), 0)  # at least one slot is left to draft
        slots = torch.arange(self.block_size)
        self._show(ids, blocks, (slots > 0) & (slots <= revealed[:, :, None]))
        return revealed

    def _replace(self, ids: Tensor, blocks: Blocks, generator: torch.Generator | None) -> Tensor:
        """Puts random tokens into slots of `blocks`, and the right ones into others. Returns which blocks have such
        others: bool [1, N]."""
        rows, shape = blocks.counts.shape[:2], blocks.counts.shape
        is_noise = torch.rand(rows, generator=generator) < self.noise_ratio
        share = torch.rand(rows, generator=generator).masked_fill(is_noise, 1.0)
        shown = blocks.counts & (torch.rand(shape, generator=generator) >= share[:, :, None])
        drawn = torch.randint(self.random_tokens, shape, generator=generator)
        blocks.noise_ids[:, :, 1:] = drawn[:, :, 1:]
        self._show(ids, blocks, shown)
        return shown.any(dim=-1)

    @staticmethod
    def _show(ids: Tensor, blocks: Blocks, slots: Tensor) -> None:
        """Puts the right tokens into these slots, bool [1, N, block_size]."""
        right = ids[0, blocks.positions.clamp(max=ids.shape[1] - 1)]
        blocks.noise_ids[:] = torch.where(slots, right, blocks.noise_ids)


def shared_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which samples share a row of at most `most` tokens. A longer sample has a row of its own.

    The others are dealt in the order of falling lengths, back and forth over as few rows as can hold them. All rows
    then have about the same number of samples, and so of blocks, which need little padding.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    alone = [index for index in order if lengths[index] > most]
    order = order[len(alone) :]
    for count in range(-(-sum(lengths[index] for index in order) // most), len(order) + 1):
        both_ways = [*range(count), *reversed(range(count))]
        rows: list[list[int]] = [[] for _ in range(count)]
        for number, index in enumerate(order):
            rows[both_ways[number % len(both_ways)]].append(index)
        if all(sum(lengths[index] for index in row) <= most for row in rows):
            break
    return [[index] for index in alone] + rows


def _joined(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row of several samples, one behind the other."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    starts = lengths.cumsum(0) - lengths
    row = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    row["context_start"] = starts.repeat_interleave(torch.tensor([len(sample["anchors"]) for sample in samples]))
    row["anchors"] = row["anchors"] + row["context_start"]
    row["context_positions"] = torch.cat([torch.arange(length) for length in lengths.tolist()])
    return row
