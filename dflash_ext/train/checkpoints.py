"""The trained weights of a checkpoint, the checkpoint to resume from, and what a run must have in common with it."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.utils.data import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .objectives import Objective
from .recipe import RunRecipe

WEIGHTS, IDENTITY = "model.safetensors", "objective.json"
# A resumed run may have more steps, and other shapes of its batches.
MAY_DIFFER = {"steps", "multiple_of"}
OF_RECIPE = ("optimizer", "learning_rate", "weight_decay", "warmup", "seed")

# Trainer writes the state last, and removes an old checkpoint only after that. Under FSDP the optimizer's state is in a
# file or folder of another name.
NEEDED = (
    (IDENTITY,),
    (WEIGHTS,),
    ("optimizer.pt", "optimizer.bin", "optimizer_0"),
    ("scheduler.pt",),
    ("trainer_state.json",),
)


def identity_of(objective: Objective, collator: Callable, recipe: RunRecipe, samples: Dataset) -> dict[str, dict]:
    """What a checkpoint and the run that continues it have in common, as JSON has it.

    Args:
        samples: what is trained on. Datasets that know a hash of themselves have it as `fingerprint()`.

    Returns:
        {"trained": what is trained; "options": what decides its loss, its batches and its steps}, by their names.
    """
    drawn = asdict(collator) if is_dataclass(collator) else {}
    options = {name: value for name, value in drawn.items() if name not in MAY_DIFFER}
    options |= {name: getattr(recipe, name) for name in OF_RECIPE}
    options |= objective.options() | {"samples": len(samples)}
    if hasattr(samples, "fingerprint"):
        options["samples' fingerprint"] = samples.fingerprint()
    identity = {"trained": objective.identity(), "options": options}
    return json.loads(json.dumps(identity))


def save_trained(objective: Objective, folder: Path, identity: Mapping[str, dict]) -> None:
    """Writes the parameters that are trained, and the run's `identity_of`.

    Every rank calls this, because sharded parameters are gathered. Rank 0 writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(objective, options=options)
    if not PartialState().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    save_file({name: weights[name].contiguous() for name in trained}, folder / WEIGHTS)
    (folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")


def load_trained(objective: Objective, folder: Path) -> None:
    """Reads what `save_trained` wrote. Every rank calls this."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(objective, load_file(folder / WEIGHTS), options=options)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint in `folder` with the most steps; None if there is none."""
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*/")}
    newest_first = sorted((path for path in steps if steps[path]), key=lambda path: int(steps[path][1]), reverse=True)
    return next(filter(is_complete, newest_first), None)


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


def check_identity(checkpoint: Path, identity: Mapping[str, dict[str, Any]], noun: str) -> None:
    """Raises ValueError, which names the first difference, unless the run of `identity` can continue a checkpoint.

    Args:
        identity: as `identity_of` returns it, or the part of it that is known.
        noun: what is trained, for messages.
    """
    saved = json.loads((checkpoint / IDENTITY).read_text())
    for part, mine in identity.items():
        theirs = saved.get(part, {})
        for name in theirs | mine:
            if mine.get(name) != theirs.get(name):
                whose = f"is of another {noun}" if part == "trained" else "is of a training with other options"
                both = f"its {name} is {theirs.get(name)}, this one's is {mine.get(name)}"
                difference = both if name in theirs and name in mine else f"only one of the two has a setting {name}"
                raise ValueError(f"{checkpoint} {whose}: {difference}")
