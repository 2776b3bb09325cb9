"""Who sees whom when a target reads tokens over a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ...masks import IntervalMask

Masks = Callable[[Mapping[str, int | None], Tensor, int, Tensor, int], dict[str, IntervalMask]]


def causal_masks(
    windows: Mapping[str, int | None], start: Tensor, rows: int, counts: Tensor, kv_len: int
) -> dict[str, IntervalMask]:
    """The causal masks of each kind of layer for `rows` new tokens in each row of the batch.

    Args:
        windows: those of `Target.windows`.
        start: int [B], the number of cached tokens before them.
        counts: int [B], how many of the new tokens exist.
        kv_len: the capacity of the cache.
    """
    options = {"q_lens": counts, "causal": True, "kv_len": kv_len}
    return {kind: IntervalMask.decode(start, rows, window=window, **options) for kind, window in windows.items()}


def block_masks(
    windows: Mapping[str, int | None], start: Tensor, rows: int, counts: Tensor, kv_len: int
) -> dict[str, IntervalMask]:
    """The masks of a block that sees all of itself, as `causal_masks` otherwise.

    All of its rows see the same cached tokens: on sliding layers, those in the window of the block's first row. This is
    how DiffusionGemma's canvas reads its prompt.
    """
    options = {"q_lens": counts, "kv_len": kv_len}
    return {
        kind: IntervalMask.decode(
            start, rows, kv_start=0 if window is None else (start - window + 1).clamp(min=0), **options
        )
        for kind, window in windows.items()
    }
