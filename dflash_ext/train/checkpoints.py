"""Finds the checkpoint to resume from: the newest complete one."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..models import DFlashConfig

# Trainer writes the state last, and removes an old checkpoint only after that. Under FSDP the optimizer's state is in a
# file or folder of another name.
NEEDED = (
    ("config.json",),
    ("model*.safetensors", "pytorch_model_fsdp*"),
    ("optimizer.pt", "optimizer.bin", "optimizer_0"),
    ("scheduler.pt",),
    ("trainer_state.json",),
)


def newest_checkpoint(folder: Path, config: DFlashConfig) -> Path | None:
    """The complete checkpoint in `folder` with the most steps; None if there is none.

    Raises:
        ValueError: the checkpoint is of a drafter with another config than `config`.
    """
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*/")}
    newest_first = sorted((path for path in steps if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)
    checkpoint = next(filter(is_complete, newest_first), None)
    if checkpoint is not None:
        _check(checkpoint, config)
    return checkpoint


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint of Trainer has all its files, each of them whole."""
    has_all = all(any(any(checkpoint.glob(pattern)) for pattern in choices) for choices in NEEDED)
    return has_all and all(map(_is_whole, checkpoint.iterdir()))


def _is_whole(path: Path) -> bool:
    """Whether a file is whole, as far as its format allows to check."""
    if path.is_dir():  # of torch.distributed.checkpoint, which writes this file last
        return (path / ".metadata").exists()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    except (SafetensorError, ValueError):
        return False
    # torch.save writes zip archives, whose directory is at the end.
    return zipfile.is_zipfile(path) if path.suffix in (".pt", ".pth", ".bin") else True


def _check(checkpoint: Path, config: DFlashConfig) -> None:
    saved = DFlashConfig.from_pretrained(checkpoint)
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "block_size")
    for name in (*sizes, "dflash_config", "sample_from_anchor", "is_causal", "window_convention"):
        mine, theirs = getattr(config, name), getattr(saved, name)
        if mine != theirs:
            raise ValueError(f"{checkpoint} is of another drafter: its {name} is {theirs}, this one's is {mine}")
