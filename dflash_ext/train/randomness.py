"""Random draws that follow from what they are for, so that no draw depends on how many were made before it."""

from __future__ import annotations

import torch

from ..data.fingerprints import generator
from ..models import DFlashDrafter, LoraDrafter, Target

__all__ = ["generator", "new_drafter", "new_lora_drafter"]


def new_drafter(target: Target, seed: int, **options) -> DFlashDrafter:
    """A float32 drafter for `target`, on its device, whose random weights follow from `seed`.

    `options` are those of `DFlashConfig.for_target`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DFlashDrafter.for_target(target, **options).to(target.device)


def new_lora_drafter(target: Target, seed: int, **options) -> LoraDrafter:
    """As `new_drafter`, a LoRA drafter. `options` are those of `LoraDrafter.for_target`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraDrafter.for_target(target, **options).to(target.device)
