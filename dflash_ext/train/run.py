"""A training run of a drafter, from prompts or answers to a folder with the drafter, its log and its plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PrinterCallback

from ..data import AnswerDataset, FeatureDataset, Server, answer_prompts
from ..models import DFlashDrafter, Target
from ..progress import progress, without_library_bars
from .checkpoints import newest_checkpoint
from .collator import AnchorCollator
from .curve import plot_curve
from .evaluation import Evaluation, HeldOutPrompts
from .objectives import DFlashObjective
from .parallel import is_sharded
from .recipe import Recipe, optimizer_of, training_arguments
from .reporting import TrainingProgress, best_evaluation, summary
from .saving import KeepBest, replace_drafter
from .trainer import DFlashTrainer


def train_on_prompts(
    drafter: DFlashDrafter,
    target: Target,
    prompts: Mapping[int, Sequence[int]],
    output: str | Path,
    recipe: Recipe,
    *,
    max_new_tokens: int = 256,
    temperatures: Sequence[float] = (0.0,),
    decode_batch: int = 32,
    stop_token_ids: Sequence[int] = (),
    chat_template_args: Mapping[str, Any] | None = None,
    conversations: Mapping[int, int] | None = None,
    server: Server | None = None,
    resume: bool = False,
    console: Console | None = None,
    **options: Any,
) -> list[dict]:
    """Lets `target` answer `prompts`, writes the answers to `output/answers.jsonl`, and trains `drafter` on them.

    If an earlier run with the same prompts left an answers file in `output`, it is continued.

    Args:
        prompts: token ids by index, as `dflash_ext.data.encode_all` returns them.
        max_new_tokens: the largest number of tokens in an answer.
        temperatures: every prompt is answered once per entry; 0 is greedy.
        decode_batch: the number of prompts that are answered at a time.
        stop_token_ids: tokens that end an answer.
        chat_template_args: the variables that the prompts were encoded with. They are kept with the answers.
        conversations, server: as `answer_prompts` takes them.
        options: `max_length` and `held_out` of `train_on_answers`, whose docstring describes the other arguments, too.
    """
    console = console or Console(quiet=True)
    if resume:  # another drafter's checkpoint is refused before the answers are made
        newest_checkpoint(Path(output), drafter.config)
    answers = Path(output) / "answers.jsonl"
    with progress(console, "the target answers", len(prompts) * len(temperatures)) as advance:
        answer_prompts(
            Target(target.model),  # untapped: answers need no features
            prompts,
            answers,
            max_new_tokens=max_new_tokens,
            temperatures=temperatures,
            batch_size=decode_batch,
            seed=recipe.seed,
            stop_token_ids=stop_token_ids,
            chat_template_args=chat_template_args,
            conversations=conversations,
            server=server,
            on_progress=advance,
        )
    return train_on_answers(drafter, target, answers, output, recipe, resume=resume, console=console, **options)


def train_on_answers(
    drafter: DFlashDrafter,
    target: Target,
    answers: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    max_length: int = 1024,
    held_out: float = 0.0,
    features: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Splits the answers, trains `drafter`, saves it to `output` and draws `output/curve.png`.

    Args:
        target: tapped at the drafter's layers.
        answers: a file written by `dflash_ext.data.answer_prompts`.
        max_length: sequences are cut to this many tokens.
        features: a folder of `dflash_ext.data.write_features` with the features of these answers. The target's layers
            then run in evaluations alone.
        held_out: the share of the conversations whose prompts are kept for evaluation.
        console: shows the progress and a summary; None shows nothing.

    Returns:
        The log of `train_drafter`, whose docstring describes the other arguments, too.
    """
    console = console or Console(quiet=True)
    dataset = AnswerDataset(answers, max_length, target=target)
    trained, kept_out = dataset.split(held_out, recipe.seed)
    prompts = HeldOutPrompts(
        kept_out.prompts()[: recipe.evaluate_prompts],
        max_new_tokens=dataset.header["max_new_tokens"],
        stop_token_ids=dataset.header["stop_token_ids"],
        denoising_steps=(1,) if recipe.noise_ratio == 1 else (1, 2, 3),
    )
    counts = {
        "to train on": len(trained),
        "held out": len(kept_out),
        "too short to train on": dataset.dropped,
        "whose text does not stand for the same tokens": dataset.no_round_trip,
    }
    told = [f"{count} {what}" for what, count in counts.items() if count or what in ("to train on", "held out")]
    console.print(f"answers: {', '.join(told)}", soft_wrap=True)
    if features is not None:
        trained, kept_out = (FeatureDataset(part, features, target) for part in (trained, kept_out))
    log = train_drafter(
        drafter, target, trained, output, recipe, held_out=kept_out, prompts=prompts, resume=resume, console=console
    )
    if PartialState().is_main_process:
        plot_curve(log, Path(output) / "curve.png")
    console.print(summary(log), soft_wrap=True)
    return log


@without_library_bars()  # Trainer saves checkpoints
def train_drafter(
    drafter: DFlashDrafter,
    target: Target,
    answers: Dataset,
    output: str | Path,
    recipe: Recipe,
    *,
    held_out: Dataset | None = None,
    prompts: HeldOutPrompts | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Trains `drafter` in place and saves it to `output` in the published layout.

    With `held_out`, the drafter is evaluated every `recipe.evaluate_every` steps and after the last one, and the best
    one is saved: that with the highest tau, or without `prompts` that with the least loss. Without `held_out`, and if
    the training is interrupted or fails between its first step and its first evaluation, the drafter is saved as it
    stands.

    Args:
        drafter: float32 on the target's device; on a GPU it trains under bfloat16 autocast.
        answers: samples {"input_ids", "loss_mask"} of the target's own answers, as `AnchorCollator` describes them.
        held_out: samples of answers to prompts that are not trained on, to measure the loss on.
        prompts: held-out prompts, to measure the tau and the speed of decoding.
        resume: continue from the newest complete checkpoint in `output`. If there is none, training starts at step 0,
            and a line says so.
        console: shows the progress, the loss and tau; None shows nothing.

    Returns:
        The log: one dict per entry, with step, loss, tau, learning rate, or with the figures of an evaluation
        (`Evaluation.measure`), each with `eval_` before its name. It is also written to `output/training.json`.

    Raises:
        ValueError: the checkpoint to resume from is of another drafter, or there is no sample to train on.
    """
    output = Path(output)
    console = console or Console(quiet=True)
    config = drafter.config
    args = training_arguments(output, recipe, target.device)
    collator = AnchorCollator(
        recipe.anchors,
        config.block_size,
        config.mask_token_id,
        config.first_draft_slot,
        noise_ratio=recipe.noise_ratio,
        block_sizes=recipe.block_sizes,
        steps=recipe.steps,
        pack_length=recipe.pack_length,
    )
    if any(not config.first_draft_slot < size <= config.block_size for size in recipe.block_sizes):
        raise ValueError(f"block sizes {recipe.block_sizes}: the drafter's blocks have {config.block_size} slots")
    evaluation = None
    if held_out is not None and len(held_out):
        as_decoded = replace(collator, noise_ratio=1.0, block_sizes=())
        evaluation = Evaluation(held_out, as_decoded, recipe.batch_size, prompts, recipe.seed)
    trainer = DFlashTrainer(
        DFlashObjective(drafter, target, recipe.gamma, loss=recipe.loss, teacher_mix=recipe.teacher_mix),
        args=args,
        train_dataset=answers,
        evaluation=evaluation,
        data_collator=collator,
        optimizer_cls_and_kwargs=optimizer_of(recipe),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(KeepBest(drafter, output))
    checkpoint = newest_checkpoint(output, config) if resume else None
    if resume:
        nothing = f"nothing to resume: there is no complete checkpoint in {output}, training starts at step 0"
        console.print(f"continuing from {checkpoint}" if checkpoint else nothing, soft_wrap=True)
    ended = False
    try:
        with TrainingProgress(console) as shown:
            if trainer.is_world_process_zero():
                trainer.add_callback(shown)
                if evaluation:
                    evaluation.on_progress = shown.on_evaluation_progress
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ended = True
    finally:
        log = [entry for entry in trainer.state.log_history if entry]
        # A run that failed at once leaves an earlier drafter alone.
        # After a fault, other ranks may not be there to gather a sharded one.
        if trainer.state.global_step and not best_evaluation(log) and (ended or not is_sharded(drafter)):
            replace_drafter(drafter, output)
        if trainer.state.global_step and trainer.is_world_process_zero():
            (output / "training.json").write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1) + "\n")
    return log
