"""Trains a drafter: from prompts or answers to a folder with the drafter, its log and its plot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from ..data import AnswerDataset, FeatureDataset, Server, answer_prompts
from ..models import LoraDrafter, Target, save_drafter, save_lora_drafter
from ..progress import progress
from .checkpoints import check_identity, newest_checkpoint
from .collator import AnchorCollator
from .evaluation import DraftingEvaluation, HeldOutPrompts
from .objectives import DFlashObjective, DraftingObjective, LoraObjective
from .parallel import Drafter, asks_for_fsdp, is_sharded, whole_copy
from .recipe import DraftingRecipe, LoraRecipe, Recipe
from .run import run
from .saving import check_output

Collator = Callable[[list[Mapping]], dict[str, Tensor]]


def train_on_prompts(
    drafter: Drafter,
    target: Target,
    prompts: Mapping[int, Sequence[int]],
    output: str | Path,
    recipe: DraftingRecipe,
    *,
    max_new_tokens: int = 256,
    temperatures: Sequence[float] = (0.0,),
    decode_batch: int = 32,
    stop_token_ids: Sequence[int] = (),
    chat_template_args: Mapping[str, Any] | None = None,
    conversations: Mapping[int, int] | None = None,
    server: Server | None = None,
    resume: bool = False,
    overwrite: bool = False,
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
    output = Path(output)
    # What can be refused is refused before the answers are made.
    check_output(output, resume=resume, overwrite=overwrite)
    objective = parts_of(drafter, target, recipe).objective
    if resume and (checkpoint := newest_checkpoint(output)):
        check_identity(checkpoint, {"trained": objective.identity()}, objective.noun)
    answers = output / "answers.jsonl"
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
    options |= dict(resume=resume, overwrite=overwrite, console=console)
    return train_on_answers(drafter, target, answers, output, recipe, **options)


def train_on_answers(
    drafter: Drafter,
    target: Target,
    answers: str | Path,
    output: str | Path,
    recipe: DraftingRecipe,
    *,
    max_length: int = 1024,
    held_out: float = 0.0,
    features: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Splits the answers, trains `drafter` and saves it to `output`.

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
        denoising_steps=recipe.denoising_steps,
        forwards=recipe.forwards if isinstance(recipe, LoraRecipe) else None,
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
    options = dict(held_out=kept_out, prompts=prompts, resume=resume, overwrite=overwrite, console=console)
    return train_drafter(drafter, target, trained, output, recipe, **options)


def train_drafter(
    drafter: Drafter,
    target: Target,
    answers: Dataset,
    output: str | Path,
    recipe: DraftingRecipe,
    *,
    held_out: Dataset | None = None,
    prompts: HeldOutPrompts | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Trains `drafter` in place and saves it to `output` in the published layout.

    With `held_out`, the drafter is evaluated every `recipe.evaluate_every` steps and after the last one, and the best
    one is saved: that with the highest tau, or without `prompts` that with the least loss.

    Args:
        drafter: float32 on the target's device; on a GPU it trains under bfloat16 autocast.
        answers: samples {"input_ids", "loss_mask"} of the target's own answers, as `AnchorCollator` describes them.
        held_out: samples of answers to prompts that are not trained on, to measure the loss on.
        prompts: held-out prompts, to measure the tau and the speed of decoding. If ranks share the target, nothing is
            decoded, and a line says so.

    Returns:
        The log of `run`, whose docstring describes the other arguments, too.

    Raises:
        ValueError: as in `run`.
    """
    parts = parts_of(drafter, target, recipe)
    if console is not None and not isinstance(drafter, LoraDrafter):
        for sentence in drafter.config.unread_elsewhere():
            console.print(sentence, soft_wrap=True, highlight=False)
    is_shared = recipe.tensor_parallel or asks_for_fsdp(recipe.trainer_args)
    if prompts is not None and parts.objective.shards_target and is_shared:
        prompts = None
        if console is not None:
            console.print("evaluations decode nothing: the ranks share the target", soft_wrap=True)
    evaluation = None
    if held_out is not None and len(held_out):
        options = dict(seed=recipe.seed, prompts=prompts)
        evaluation = DraftingEvaluation(held_out, parts.held_out_collator, recipe.batch_size, **options)
    return run(
        parts.objective,
        answers,
        output,
        recipe,
        collator=parts.collator,
        save=parts.save,
        evaluation=evaluation,
        resume=resume,
        overwrite=overwrite,
        console=console,
    )


class Parts(NamedTuple):
    """What a run needs to know of a kind of drafter.

    Attributes:
        collator: makes the batches of the training.
        held_out_collator: makes those of evaluations, which measure what decoding does.
        save: writes the drafter to a folder, as `run` takes it.
    """

    objective: DraftingObjective
    collator: Collator
    held_out_collator: Collator
    save: Callable[[Path], None]


def parts_of(drafter: Drafter, target: Target, recipe: DraftingRecipe) -> Parts:
    """The parts of a run that trains `drafter`, by its kind.

    Raises:
        ValueError: the recipe is one for another kind of drafter, or has blocks that the drafter does not have.
    """
    is_lora = isinstance(drafter, LoraDrafter)
    needed, first_slot = (LoraRecipe, 1) if is_lora else (Recipe, drafter.config.first_draft_slot)
    if not isinstance(recipe, needed):
        raise ValueError(f"a {type(drafter).__name__} is trained by a {needed.__name__}, not {type(recipe).__name__}")
    size = drafter.config.block_size
    if any(not first_slot < each <= size for each in recipe.block_sizes):
        raise ValueError(f"block sizes {recipe.block_sizes}: the drafter's blocks have {size} slots")
    as_decoded = AnchorCollator(
        recipe.anchors, size, drafter.config.mask_token_id, first_slot, pack_length=recipe.pack_length
    )
    if not is_lora and drafter.config.noise == "uniform":
        as_decoded = replace(as_decoded, random_tokens=target.vocab_size)
    collator = replace(as_decoded, block_sizes=recipe.block_sizes, steps=recipe.steps)
    if is_lora:
        options = dict(context_ratio=recipe.context_ratio, fixed=recipe.fixed_anchors)
        collator = replace(collator, slot_noise=recipe.noise_ratio, **options)
        if recipe.cuda_graphs:
            collator = replace(collator, multiple_of=64)
        weights = dict(gamma=recipe.gamma, kl_weight=recipe.kl_weight, forwards=recipe.forwards)
        objective = LoraObjective(drafter, target, **weights)
    else:
        collator = replace(collator, noise_ratio=recipe.noise_ratio)
        objective = DFlashObjective(drafter, target, recipe.gamma, loss=recipe.loss, teacher_mix=recipe.teacher_mix)

    def save(folder: Path) -> None:
        whole = whole_copy(drafter) if is_sharded(objective) else drafter
        if not PartialState().is_main_process:
            return
        if is_lora:
            save_lora_drafter(whole, folder, base_name=target.model.config.name_or_path or None, dtype=torch.bfloat16)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the drafter in")  # `train_drafter` tells it once
                save_drafter(whole, folder, dtype=torch.bfloat16)

    return Parts(objective, collator, as_decoded, save)
