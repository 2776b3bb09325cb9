"""What the operators need to know about devices before they start."""

from __future__ import annotations

import torch
from torch import Tensor


def check_one_device(op: str, **arguments: object) -> None:
    """Raises ValueError, naming the first two, if those arguments that are tensors are on different devices."""
    given = [(name, x.device) for name, x in arguments.items() if isinstance(x, Tensor)]
    first, device = given[0]
    for name, other in given[1:]:
        if other != device:
            raise ValueError(f"{op}: {first} is on {device}, {name} on {other}; one device is needed")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to there; None where it is off, or unknown as on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
