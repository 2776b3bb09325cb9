"""Tau of training blocks: what greedy decoding would have committed on the answers that are trained on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .losses import Losses


def commit_limits(loss_mask: Tensor, anchors: Tensor, keep: Tensor, drafted: int, *, is_cut: bool) -> Tensor:
    """The largest number of tokens that a cycle from each anchor could commit: int64 [B, N].

    It is the number of tokens that the answer has after the anchor, and at most `drafted` + 1, for the bonus token. It
    is 0, which stands for unknown, where the anchor is not kept or the answer is cut before that many tokens.

    Args:
        loss_mask: bool [B, S], True on the tokens of the answer.
        anchors, keep: int64 and bool [B, N], as from `sample_anchors`.
        drafted: the number of drafted tokens in a block.
        is_cut: whether the answers go on beyond the end of the sequences.
    """
    length = loss_mask.shape[1]
    after = anchors[:, :, None] + 1 + torch.arange(drafted + 1, device=anchors.device)
    there = loss_mask.gather(1, after.clamp(max=length - 1).flatten(1)).view_as(after) & (after < length)
    limits = there.cumprod(dim=-1).sum(dim=-1)
    if is_cut:
        keep = keep & (there.all(dim=-1) | (anchors + limits < length - 1))
    return limits.masked_fill(~keep, 0)


class TauOfBlocks:
    """Collects blocks, and gives the tau that greedy decoding would have had on them.

    A block commits the drafted tokens that are right, up to the first wrong one, and the bonus token, as far as the
    answer goes. Decoding starts its next cycle where the last one ended, so in each sequence the blocks that start
    before that are passed over. Where every position of an answer is an anchor, this is exactly the tau of decoding a
    greedy answer; otherwise the next cycle starts at the next anchor.
    """

    name = "tau"

    def __init__(self):
        self._blocks: list[Tensor] = []

    def add(self, batch: Mapping[str, Tensor], result: Losses) -> None:
        """Adds the blocks of a batch; nothing waits for the device.

        Args:
            batch: with `anchors` int64 [B, N], ascending among those whose limit is not 0, and `limits` int64 [B, N],
                as from `commit_limits`.
            result: of the drafted slots, [B, N, K].
        """
        run = (result.correct & result.counts).int().cumprod(dim=-1).sum(dim=-1)
        self._blocks.append(torch.stack([batch["anchors"], (run + 1).minimum(batch["limits"])]))

    def take(self) -> Tensor:
        """The number of committed tokens and of cycles in the blocks since the last call: float64 [2] on the CPU."""
        total = torch.zeros(2, dtype=torch.float64)
        if not self._blocks:
            return total
        # A row for each sequence, padded with blocks that commit nothing.
        rows = [blocks.cpu().transpose(0, 1).unbind() for blocks in self._blocks]
        self._blocks.clear()
        padded = pad_sequence([row.T for batch in rows for row in batch], batch_first=True)
        end = torch.zeros(len(padded), dtype=torch.int64)  # the earliest position of each sequence's next cycle
        for anchor, tokens in padded.permute(1, 2, 0):
            starts = (anchor >= end) & (tokens > 0)
            end = torch.where(starts, anchor + tokens, end)
            total += torch.stack([tokens[starts].sum(), starts.sum()])
        return total
