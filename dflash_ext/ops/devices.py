"""Autocast, as the operators apply it to their arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts on a device; None if it is off or the device has none (meta)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of an operator, cast to autocast's dtype. If autocast leaves the dtype of one alone, none is cast."""
    # `is_cuda` takes a tenth of the time that `device.type` takes.
    if not torch.is_autocast_enabled("cuda" if tensors[0].is_cuda else "cpu"):
        return tensors
    dtype = autocast_dtype(tensors[0].device)
    cast = (torch.float32, torch.bfloat16, torch.float16)
    if dtype is None or any(x is not None and x.dtype not in cast for x in tensors):
        return tensors
    return tuple(None if x is None else x.to(dtype) for x in tensors)
