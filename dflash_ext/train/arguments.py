"""The TrainingArguments of a run, made from its recipe."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from .muon import MuonWithAdamW
from .recipe import RunRecipe

# Transformers 5.24 renamed the argument.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
# The arguments that a run decides, and the option of `dflash-ext train` that sets each.
DECIDED = {
    "output_dir": "--output",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulation",
    "learning_rate": "--learning-rate",
    "seed": "--seed",
    "data_seed": "--seed",
    "save_strategy": "--save-every",
    "save_steps": "--save-every",
    "eval_strategy": "--evaluate-every",
    "eval_steps": "--evaluate-every",
    "activation_checkpointing": "--checkpoint-activations",
    "gradient_checkpointing": "--checkpoint-activations",
    "torch_compile": "--compile",
    "report_to": "--report-to",
    "resume_from_checkpoint": "--resume",
    "use_cpu": "--device",
    "auto_find_batch_size": "no option, the order of the samples",
    "metric_for_best_model": "no option, the evaluation",
    "greater_is_better": "no option, the evaluation",
    "train_sampling_strategy": "no option, the seed",
    "remove_unused_columns": "no option, the collator",
}


class OneDeviceArguments(TrainingArguments):
    """Arguments of a process that trains on one device.

    If Trainer sees several GPUs, it wraps the model in DataParallel, which cannot split a drafter's inputs. To use
    several GPUs, torchrun starts one process for each.
    """

    pinned: torch.device | None = None

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)

    @property
    def device(self) -> torch.device:
        return self.pinned or super().device


def training_arguments(output: Path, recipe: RunRecipe, device: torch.device) -> OneDeviceArguments:
    """The arguments of a run that writes to `output`, on `device` unless torchrun started the process.

    Raises:
        ValueError: `recipe.trainer_args` has a name that TrainingArguments does not have, or that the run decides.
    """
    check_names(recipe.trainer_args)
    on_gpu = device.type == "cuda"
    settings = dict(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * recipe.steps),
        max_grad_norm=1.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        **{CHECKPOINTING: recipe.checkpoint_activations},
        torch_compile=recipe.compile,
        logging_steps=min(recipe.log_every, recipe.steps),
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=1,
        eval_steps=recipe.evaluate_every or recipe.steps,  # Trainer always evaluates after the last step
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # TrainingOrder decides
        remove_unused_columns=False,
        dataloader_num_workers=4 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        logging_nan_inf_filter=False,
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every parameter that is trained is used in every step
    )
    args = OneDeviceArguments(**settings | recipe.trainer_args)
    if on_gpu and args.world_size == 1:
        args.pinned = device
        torch.cuda.set_device(device)  # Accelerate places batches on the current device
    return args


def optimizer_of(recipe: RunRecipe) -> tuple[type[torch.optim.Optimizer], dict] | None:
    """The class and the options of an optimizer that Trainer does not have; None for one that it has."""
    return (MuonWithAdamW, {"lr": recipe.learning_rate}) if recipe.optimizer == "muon" else None


def check_names(names: Iterable[str]) -> None:
    """Raises a ValueError for a name that TrainingArguments does not have, or whose value the run decides."""
    known = {field.name for field in fields(TrainingArguments)}
    for name in names:
        if name in DECIDED:
            raise ValueError(f"the argument {name} of Trainer is set by {DECIDED[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"Trainer has no argument {name}" + (f"; did you mean {near[0]}?" if near else ""))


def trainer_arguments(words: Sequence[str]) -> dict[str, Any]:
    """The arguments of TrainingArguments in words like "max_grad_norm=0.5", each with the type of its field.

    Raises:
        ValueError: a word has another form, the run decides this argument, or the value is of another type.
    """
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False)
    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"'{word}': name=value is expected, such as max_grad_norm=0.5")
        check_names([name])
        try:
            arguments[name] = getattr(parser.parse_args([f"--{name}={value}"]), name)
        except argparse.ArgumentError as error:
            raise ValueError(f"'{word}': {error.message}") from None
        if name == "fsdp" and value in ("true", "false"):  # its field is declared as words alone
            arguments[name] = value == "true"
    return arguments
