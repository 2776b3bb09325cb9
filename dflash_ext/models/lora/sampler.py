"""A small head that lets a drafted token depend on the one before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .split import local


class SamplerHead(nn.Module):
    """A two-layer MLP on a row's hidden state and the embedding of the token before the row.

    A block of mask rows is drafted at once, so that no row knows which tokens the others draw. The head adds to a row's
    hidden state what the token before it tells. A decoder runs it row after row, and scores only the likeliest
    candidates of each row with it. (A coherence head over candidates: LiLiCorr, arXiv 2608.20530.)

    Until it is trained it changes nothing.

    Args:
        hidden_size: that of the language model.
        width: the inner dimension.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.inner = nn.Linear(2 * hidden_size, width, bias=False)
        self.outer = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """The hidden states [..., H] to score candidates with: `head[candidates] @ result`.

        Args:
            hidden: [..., H], to which the model applies its head.
            previous: [..., H], the base's embedding of the token before each row.
        """
        x = torch.cat([nn.functional.rms_norm(each, each.shape[-1:]) for each in (hidden, previous)], dim=-1)
        inner, outer = local(self.inner.weight), local(self.outer.weight)
        return hidden + nn.functional.linear(nn.functional.silu(nn.functional.linear(x, inner)), outer)
