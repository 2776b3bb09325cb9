"""Random draws that follow from what they are for, so that no draw depends on how many were made before it."""

from __future__ import annotations

import torch

from ..data.fingerprints import hash_of
from ..models import DFlashDrafter, LoraDrafter, Target


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose draws follow from `key`, such as ("anchors", seed, step, index).

    A run that resumes, more ranks or more workers draw the same numbers, because the key names what is drawn and not
    who draws it or when.
    """
    return torch.Generator().manual_seed(hash_of(*key) >> 1)


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
