"""The losses of a batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """The results of a batch's tokens, in one shape, which each objective chooses.

    Attributes:
        losses: float32, the loss of each token times its weight, 0 where a token does not count.
        counts: bool, the tokens that have a label.
        correct: bool, whether the label is the most probable token. It means nothing where a token does not count.
    """

    losses: Tensor
    counts: Tensor
    correct: Tensor
