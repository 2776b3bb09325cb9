"""Writes what a run has trained."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from .reporting import best_evaluation

PART = ".saved.part"  # where the files are written before they replace those in the output folder
# What decides how a folder is read, and what an earlier training of another kind would leave there.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_*", "lora_drafter.json")


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
