"""A training run of any objective: from samples to a folder with what was trained, its log and its plot."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback

from ..progress import without_library_bars
from .arguments import optimizer_of, training_arguments
from .checkpoints import check_identity, identity_of, newest_checkpoint
from .curve import plot_curve
from .evaluation import Evaluation
from .objectives import Objective
from .parallel import is_sharded
from .recipe import RunRecipe
from .reporting import LastLog, TrainingProgress, best_evaluation, has_diverged, summary
from .saving import LOG, KeepBest, check_output, remove_checkpoints, replace_saved
from .trainer import ObjectiveTrainer


@contextmanager
def _without_trainers_notes() -> Iterator[None]:
    """Hides what Trainer says of checkpoints. `check_identity` has compared what a resumed run may not change."""
    logger = logging.getLogger("transformers.trainer_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@without_library_bars()  # Trainer saves checkpoints
@_without_trainers_notes()
def run(
    objective: Objective,
    samples: Dataset,
    output: str | Path,
    recipe: RunRecipe,
    *,
    collator: Callable[[list[Mapping]], dict[str, Tensor]],
    save: Callable[[Path], None],
    evaluation: Evaluation | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Trains `objective` in place and saves what it trained to `output`.

    With an evaluation, there is one every `recipe.evaluate_every` steps and after the last one, and what was best in it
    is saved. Without one, and if the training is interrupted or fails between its first step and its first evaluation,
    the last state is saved.

    Args:
        objective: what is trained is float32 on the target's device; on a GPU it trains under bfloat16 autocast.
        samples: {"input_ids": int64 [S], ...}. The collator gets each with its "key", from which alone it draws.
        collator: makes a batch of samples.
        save: writes what was trained to the folder that it is given, as users read it. Every rank calls it, and rank 0
            alone writes.
        evaluation: what is measured on held-out samples.
        resume: continue from the newest complete checkpoint in `output`. If there is none, training starts at step 0,
            and a line says so.
        overwrite: replace what an earlier training left in `output`, unless it is resumed.
        console: shows the progress, the loss and the figure beside it, and a summary; None shows nothing.

    Returns:
        The log: one dict per entry, with step, loss, the figure of the objective's meter and the learning rate, or with
        the figures of an evaluation, each with `eval_` before its name. It is also written to `output/training.json`
        and drawn into `output/curve.png`.

    Raises:
        ValueError: `output` has an earlier training, which is neither resumed nor overwritten; the checkpoint to resume
            from is of something else or of other options; there is no sample to train on; the recipe asks for CUDA
            graphs where they cannot be used; or the training diverges.
    """
    output = Path(output)
    check_output(output, resume=resume, overwrite=overwrite)
    identity = identity_of(objective, collator, recipe, samples)
    checkpoint = newest_checkpoint(output) if resume else None
    if checkpoint is not None:
        check_identity(checkpoint, identity, objective.noun)
    console = console or Console(quiet=True)
    best = evaluation.best if evaluation else Evaluation.best
    trainer = ObjectiveTrainer(
        objective,
        args=training_arguments(output, recipe, objective.target.device),
        cuda_graphs=recipe.cuda_graphs,
        identity=identity,
        shares_layers=recipe.tensor_parallel,
        train_dataset=samples,
        evaluation=evaluation,
        data_collator=collator,
        optimizer_cls_and_kwargs=optimizer_of(recipe),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(KeepBest(save, output, best))
    trainer.add_callback(LastLog())
    if overwrite and not resume and trainer.is_world_process_zero():
        remove_checkpoints(output)
    if resume:
        nothing = f"nothing to resume: there is no complete checkpoint in {output}, training starts at step 0"
        console.print(f"continuing from {checkpoint}" if checkpoint else nothing, soft_wrap=True)
    ended = False
    try:
        with TrainingProgress(console, objective.noun, objective.meter.name) as shown:
            if trainer.is_world_process_zero():
                trainer.add_callback(shown)
                if evaluation:
                    evaluation.on_progress = shown.on_evaluation_progress
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ended = True
    finally:
        log = [entry for entry in trainer.state.log_history if entry]
        # A run that failed at once or diverged leaves an earlier result alone.
        # After a fault, other ranks may not be there to gather what is sharded.
        is_worth_it = trainer.state.global_step and not best_evaluation(log, best) and not has_diverged(log)
        if is_worth_it and (ended or not is_sharded(objective)):
            replace_saved(save, output)
        if trainer.state.global_step and trainer.is_world_process_zero():
            (output / LOG).write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1) + "\n")
    if trainer.is_world_process_zero():
        plot_curve(log, output / "curve.png", objective.meter.name)
    console.print(summary(log, objective.noun, objective.meter.name, best), highlight=False, soft_wrap=True)
    return log
