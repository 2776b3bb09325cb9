"""Who sees whom while a causal LM learns to denoise: the three patterns, on rows of several documents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..masks import IntervalMask

PATTERNS = ("causal", "prefix_block", "block_causal")
CONTEXTS = ("causal", "block_causal")


def denoising_masks(
    bounds: Mapping[str, Tensor],
    windows: Mapping[str, int | None],
    pattern: str,
    *,
    context: str = "causal",
    block_size: int | None = None,
) -> dict[str, IntervalMask]:
    """The masks of each kind of layer, by its window.

    Every document has a prefix and, behind it, tokens to denoise. No token sees another document.

    - "causal" (L1): every token sees those before it and itself.
    - "prefix_block" (L2): the prefix is causal; the tokens behind it see all of their document.
    - "block_causal": rows hold the noised tokens and, behind them, the right ones, 2 S in all (BD3-LM, arXiv
      2503.09573). The tokens to denoise form blocks of `block_size`. A noised token sees the right tokens before its
      block and all of its block. A right token sees the right ones before it and itself ("causal"), or all of its block
      and those before it ("block_causal"): this is the form in which a committed block is encoded in decoding.

    A window of W tokens hides what is W tokens or more away, in both directions. The context of a block is the same for
    all of its rows, as in decoding: the last W - 1 tokens before it.

    Args:
        bounds: int32 [B, S] each, the columns at which a token's document "starts" and "ends" and at which its
            "blocks" begin.
    """
    starts, ends, blocks = (bounds[name] for name in ("starts", "ends", "blocks"))
    length = starts.shape[1]
    column = torch.arange(length, dtype=torch.int32, device=starts.device).expand_as(starts)
    is_prefix, nothing = column < blocks, torch.zeros_like(starts)
    if pattern == "block_causal":
        first = blocks + (column - blocks).div(block_size, rounding_mode="floor") * block_size
        first, last = first.where(~is_prefix, column), (first + block_size).minimum(ends).where(~is_prefix, column + 1)
    else:
        first, last = blocks, ends
    masks = {}
    for kind, window in windows.items():

        def reach(at: Tensor, window: int | None = window) -> Tensor:
            """The first token of its document that a token at `at` sees."""
            return starts if window is None else starts.maximum(at - window + 1)

        causal = reach(column), column + 1
        before = reach(first), first
        own = (first, last) if window is None else (first.maximum(column - window + 1), last.minimum(column + window))
        if pattern == "causal":
            masks[kind] = IntervalMask(*causal, nothing, nothing, length)
        elif pattern == "prefix_block":
            seen = (*_choose(is_prefix, causal, before), *_choose(is_prefix, (nothing, nothing), own))
            masks[kind] = IntervalMask(*seen, length)
        else:
            # The rows of noised tokens read right tokens, which stand behind all of them. Those of the prefix, which
            # nothing reads, see themselves.
            noised = (*_choose(is_prefix, (nothing, nothing), tuple(bound + length for bound in before)), *own)
            right = (*causal, nothing, nothing)
            if context == "block_causal":
                right = (*_choose(is_prefix, causal, before), *_choose(is_prefix, (nothing, nothing), own))
            both = zip(noised, right, strict=True)
            masks[kind] = IntervalMask(*(torch.cat([one, other + length], dim=1) for one, other in both), 2 * length)
    return masks


def _choose(condition: Tensor, yes: tuple[Tensor, Tensor], no: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tuple(torch.where(condition, one, other) for one, other in zip(yes, no, strict=True))
