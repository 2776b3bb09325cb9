"""Writes the drafter of a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from ..models import DFlashDrafter, save_drafter
from .parallel import is_sharded, whole_copy
from .reporting import best_evaluation

PART = ".drafter.part"  # where a drafter is written before it replaces the one in the output folder
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def replace_drafter(drafter: DFlashDrafter, output: Path) -> None:
    """Writes `drafter` in bfloat16 to `output`. A kill at any instant leaves either the old weights or the new ones.

    Every rank calls this, and rank 0 writes.
    """
    if is_sharded(drafter):
        drafter = whole_copy(drafter)
    if not PartialState().is_main_process:
        return
    part = output / PART
    shutil.rmtree(part, ignore_errors=True)
    save_drafter(drafter, part, dtype=torch.bfloat16)
    files = {file.name for file in part.iterdir()}
    for name in sorted(files, key="model.safetensors".__ne__):  # a folder with this file is read by it alone
        os.replace(part / name, output / name)
    for pattern in WEIGHTS:
        for old in output.glob(pattern):
            if old.name not in files:
                old.unlink()
    part.rmdir()


class KeepBest(TrainerCallback):
    """Writes the drafter to the output folder whenever an evaluation is the best so far."""

    def __init__(self, drafter: DFlashDrafter, output: Path):
        self.drafter, self.output = drafter, output

    def on_evaluate(self, args, state, control, **kwargs):
        if best_evaluation(state.log_history) is state.log_history[-1]:
            replace_drafter(self.drafter, self.output)
