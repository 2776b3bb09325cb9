"""The bounds that native operators write into masks, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import block_window


def decode_mask(
    cache_lens: Tensor,
    q_lens: Tensor,
    kv_start: Tensor,
    block_len: int,
    kv_len: int,
    causal: bool = False,
    window: int | None = None,
    convention: str | None = None,
) -> Tensor:
    """The bounds of ``IntervalMask.decode``: int64 ``[4, B, block_len]``, in the order of IntervalMask's fields.

    cache_lens, q_lens, kv_start: int64 ``[B]`` or ``[1]``.
    """
    cached, rows, start = (lengths[:, None] for lengths in (cache_lens, q_lens.clamp(max=block_len), kv_start))
    slot = torch.arange(block_len)[None]
    behind, first, last = block_window(slot, block_len, causal, window, convention)
    bounds = torch.broadcast_tensors(
        start if behind is None else torch.maximum(start, cached - behind),
        cached,
        torch.maximum(start, cached + first),
        cached + torch.minimum(rows, last),
        slot < rows,
    )
    return torch.stack([bound.clamp(0, kv_len) for bound in bounds[:4]]).where(bounds[4], 0)
