"""A target together with its drafter, of whichever kind."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from .denoiser import Denoiser
from .denoiser_files import is_denoiser, load_denoiser
from .drafter import DFlashDrafter
from .drafter_files import load_drafter
from .lora import LoraDrafter, is_lora_drafter, load_lora_drafter
from .lora.files import CONFIG
from .target import Target


def load_pair(
    model: PreTrainedModel, name: str | os.PathLike, base: PreTrainedModel | None = None
) -> tuple[Target, DFlashDrafter | LoraDrafter | Denoiser]:
    """A target, tapped as its drafter needs it, and the drafter, in the model's dtype and on its device.

    Args:
        name: the folder of a LoRA drafter or of a denoiser of uniform noise, or what `load_drafter` takes.
        base: the base of a whole LoRA drafter or of a denoiser, if `model`, which verifies, is another model.

    Raises:
        ValueError: there is no such drafter, it does not fit `model`, or a DFlash drafter comes with a base.
    """
    if is_lora_drafter(name):
        target = Target(model)
        return target, load_lora_drafter(name, target, base=None if base is None else Target(base))
    if is_denoiser(name):
        denoiser = load_denoiser(model if base is None else base, name)
        if denoiser.mask_id is not None:
            raise ValueError(
                f"no drafter in '{name}': a denoiser with a mask token drafts as a LoRA drafter, "
                f"and there is no {CONFIG}; one with full weights has none"
            )
        return Target(model), denoiser
    if base is not None:
        raise ValueError(f"'{name}' is a DFlash drafter, which has no base of its own")
    drafter = load_drafter(name, dtype=model.dtype, device=model.device)
    target = Target(model)
    try:
        drafter.check_target(target)
        return Target(model, drafter.config.target_layer_ids), drafter
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from None
