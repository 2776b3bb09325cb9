"""The models that the options name, with mistakes in those options found before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path


def no_bars_for_weights() -> None:
    """Reading and writing them takes moments."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_target(name: str, tokenizer: str | None, dtype: str | None, device: str | None):
    """The target and its tokenizer, as the options name them."""
    import torch

    from .. import models

    no_bars_for_weights()
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"dtype '{dtype}' is not supported; choose one of {', '.join(kinds)}")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device '{device}' is not supported; choose cpu or cuda")
    where = torch.device(device) if device else None
    if where is not None and where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"there is no CUDA device for --device {device} here ({found} found): leave it out")
    return models.load_target(name, tokenizer=tokenizer, dtype=kinds.get(dtype), device=where)


def load_pair(model, path: Path | None):
    """The target, tapped for the drafter in `path` if there is one, and that drafter."""
    from ..models import Target, load_drafter

    if path is None:
        return Target(model), None
    drafter = load_drafter(path, dtype=model.dtype, device=model.device)
    return Target(model, drafter.config.target_layer_ids), drafter
