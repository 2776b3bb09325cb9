"""The trained weights of a checkpoint, and the checkpoint to resume from: the newest complete one."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .objectives import Objective

WEIGHTS, IDENTITY = "model.safetensors", "objective.json"

# Trainer writes the state last, and removes an old checkpoint only after that. Under FSDP the optimizer's state is in a
# file or folder of another name.
NEEDED = (
    (IDENTITY,),
    (WEIGHTS,),
    ("optimizer.pt", "optimizer.bin", "optimizer_0"),
    ("scheduler.pt",),
    ("trainer_state.json",),
)


def save_trained(objective: Objective, folder: Path) -> None:
    """Writes the parameters that are trained, and what tells this objective from others, as JSON.

    Every rank calls this, because sharded parameters are gathered. Rank 0 writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(objective, options=options)
    if not PartialState().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    save_file({name: weights[name].contiguous() for name in trained}, folder / WEIGHTS)
    (folder / IDENTITY).write_text(json.dumps(objective.identity(), indent=1) + "\n")


def load_trained(objective: Objective, folder: Path) -> None:
    """Reads what `save_trained` wrote. Every rank calls this."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(objective, load_file(folder / WEIGHTS), options=options)


def newest_checkpoint(folder: Path, objective: Objective) -> Path | None:
    """The complete checkpoint in `folder` with the most steps; None if there is none.

    Raises:
        ValueError: the checkpoint is of something else than `objective`.
    """
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*/")}
    newest_first = sorted((path for path in steps if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)
    checkpoint = next(filter(is_complete, newest_first), None)
    if checkpoint is not None:
        _check(checkpoint, objective)
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


def _check(checkpoint: Path, objective: Objective) -> None:
    saved = json.loads((checkpoint / IDENTITY).read_text())
    mine = json.loads(json.dumps(objective.identity()))
    for name in mine.keys() | saved.keys():
        if mine.get(name) != saved.get(name):
            raise ValueError(
                f"{checkpoint} is of another {objective.noun}: its {name} is {saved.get(name)}, "
                f"this one's is {mine.get(name)}"
            )
