"""A LoRA drafter's folder: an adapter in PEFT's format, and two small files of what PEFT has no place for."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..loading import first_line
from ..target import Target
from .config import LoraDrafterConfig
from .drafter import LoraDrafter
from .peft_files import load_adapter, save_adapter

CONFIG = "lora_drafter.json"
WEIGHTS = "lora_drafter.safetensors"


def is_lora_drafter(folder: str | os.PathLike) -> bool:
    """Whether a folder says that it holds a LoRA drafter."""
    return (Path(folder) / CONFIG).is_file()


def save_lora_drafter(
    drafter: LoraDrafter,
    folder: str | os.PathLike,
    *,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a drafter. PEFT reads the folder as that of a plain adapter.

    Args:
        base_name: the base's folder or name on the hub, for PEFT's users.
        dtype: that of the tensors, the drafter's own by default.
    """
    folder = Path(folder)
    save_adapter(drafter.adapter, folder, base_name=base_name, dtype=dtype)
    own = {name: tensor for name, tensor in drafter.state_dict().items() if not name.startswith("adapter.")}
    own = {name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in own.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    drafter.config.save(folder / CONFIG)


def load_lora_drafter(
    folder: str | os.PathLike,
    target: Target,
    *,
    base: Target | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> LoraDrafter:
    """Reads a drafter for `target`, in evaluation mode.

    Args:
        base: the drafter's base, if `target` is another model, which verifies (`LoraDrafter.check_verifier`).
        dtype, device: those of the target by default.

    Raises:
        ValueError: there is no LoRA drafter, it was made for another base, or its tensors do not fit its config.
    """
    folder = Path(folder)
    if not is_lora_drafter(folder):
        raise ValueError(f"no LoRA drafter in '{folder}': there is no {CONFIG}")
    config = LoraDrafterConfig.load(folder / CONFIG)
    config.check_target(base or target)
    drafter = LoraDrafter(config, load_adapter(folder, base or target))
    drafter.base = base
    drafter.check_verifier(target)
    try:
        own = load_file(folder / WEIGHTS)
        needed = {name: tensor for name, tensor in drafter.state_dict().items() if not name.startswith("adapter.")}
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in needed.items()}:
            raise ValueError(f"{WEIGHTS} does not hold {', '.join(needed)} in the shapes of its config")
        drafter.load_state_dict(own, strict=False)
    except Exception as error:  # safetensors raises many kinds
        raise ValueError(f"cannot read the LoRA drafter in '{folder}': {first_line(error)}") from error
    return drafter.to(device or target.device, dtype or target.dtype).eval()
