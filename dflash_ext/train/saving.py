"""Writes what a run has trained, and guards what an earlier one left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoints import newest_checkpoint
from .reporting import best_evaluation

PART = ".saved.part"  # where the files are written before they replace those in the output folder
# What decides how a folder is read, and what an earlier training of another kind would leave there.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_*", "lora_drafter.json")
LOG, CHECKPOINTS = "training.json", f"{PREFIX_CHECKPOINT_DIR}-*"


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if a run would replace what an earlier one left in `output`: its log, weights or checkpoints.

    With `resume` it would if the earlier one has ended and left no checkpoint.
    """
    found = sorted(path.name for pattern in (LOG, "*.safetensors", CHECKPOINTS) for path in output.glob(pattern))
    if not found or overwrite:
        return
    checkpoint = newest_checkpoint(output)
    if resume and (checkpoint or LOG not in found):
        return
    there = f"{output} already has {', '.join(found[:3])}"
    how = f"--resume continues from {checkpoint.name}" if checkpoint else "no checkpoint is there to resume from"
    raise ValueError(f"{there}: {how}, --overwrite replaces what is there; or name another folder")


def remove_checkpoints(output: Path) -> None:
    """Removes the checkpoints of an earlier run, which are not those of the run that replaces it."""
    for path in output.glob(CHECKPOINTS):
        shutil.rmtree(path)


def replace_saved(save: Callable[[Path], None], output: Path) -> None:
    """Puts what `save` writes into `output`. A kill at any instant leaves either the old weights or the new ones.

    Every rank calls this.

    Args:
        save: writes to the folder that it is given. Every rank calls it, and rank 0 alone writes.
    """
    part, is_main = output / PART, PartialState().is_main_process
    if is_main:
        shutil.rmtree(part, ignore_errors=True)
    save(part)
    if not is_main:
        return
    files = {file.name for file in part.iterdir()}
    for name in sorted(files, key="model.safetensors".__ne__):  # a folder with this file is read by it alone
        os.replace(part / name, output / name)
    for pattern in WEIGHTS:
        for old in output.glob(pattern):
            if old.name not in files:
                old.unlink()
    part.rmdir()


class KeepBest(TrainerCallback):
    """Saves to the output folder whenever an evaluation is the best so far; `save` is as `replace_saved` takes it."""

    def __init__(self, save: Callable[[Path], None], output: Path, best: tuple[str, bool]):
        self.save, self.output, self.best = save, output, best

    def on_evaluate(self, args, state, control, **kwargs):
        if best_evaluation(state.log_history, self.best) is state.log_history[-1]:
            replace_saved(self.save, self.output)
