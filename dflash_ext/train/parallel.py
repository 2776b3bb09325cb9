"""Modules that FSDP2 has sharded over the ranks of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models import DFlashDrafter, LoraDrafter

Drafter = DFlashDrafter | LoraDrafter


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_copy(drafter: Drafter, dtype: torch.dtype | None = None) -> Drafter:
    """A copy of a drafter with whole tensors, in evaluation mode, to decode with or to save.

    Every rank must call this if the drafter is sharded, and every rank gets the copy.

    Args:
        dtype: that of the copy, the drafter's own by default.
    """
    tensors = {name: _whole(tensor) for name, tensor in drafter.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        copy = drafter.new_like() if isinstance(drafter, LoraDrafter) else DFlashDrafter(drafter.config)
    copy.load_state_dict(tensors)
    return copy.to(next(iter(tensors.values())).device, dtype or drafter.dtype).eval()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
