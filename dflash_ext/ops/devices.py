"""What the operators need to know about devices before they start."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to there; None where it is off, or unknown as on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of an operator, cast to autocast's dtype unless one is of a type that autocast leaves alone."""
    # Asking for the kind of device in this way takes a tenth of the time that `device.type` takes.
    if not torch.is_autocast_enabled("cuda" if tensors[0].is_cuda else "cpu"):
        return tensors
    dtype = autocast_dtype(tensors[0].device)
    cast = (torch.float32, torch.bfloat16, torch.float16)
    if dtype is None or any(x is not None and x.dtype not in cast for x in tensors):
        return tensors
    return tuple(None if x is None else x.to(dtype) for x in tensors)
