"""One training run of a drafter: from prompts or answers to a folder with the drafter, its log and its curve."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..data import Conversation, ResponseDataset, regenerate
from ..models import DFlashConfig, DFlashDrafter, Target
from ..progress import progress
from .curve import plot_curve
from .reporting import TrainingProgress, summary
from .trainer import AnchorCollator, DFlashTrainer


@dataclass
class Recipe:
    """How to train; the defaults are the DFlash paper's where a small budget allows (arXiv 2602.06036).

    Attributes:
        steps: optimizer steps.
        batch_size: sequences per device and forward pass.
        accumulation: forward passes per step.
        anchors: blocks drawn from each sequence.
        gamma: decay of the position weights; None for D-PACE weights.
        warmup: share of the steps over which the learning rate rises before its cosine decay.
        save_every: steps between the checkpoints that an interrupted run resumes from; 0 for none.
        compile: run the drafter under torch.compile.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    anchors: int = 64
    learning_rate: float = 6e-4
    weight_decay: float = 0.01
    gamma: float | None = None
    warmup: float = 0.04
    seed: int = 0
    save_every: int = 0
    log_every: int = 10
    compile: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation", "anchors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma is {self.gamma}: a decay above 0 is needed, or none for D-PACE weights")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: a finite rate above 0 is needed")


def train_on_prompts(
    drafter: DFlashDrafter,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    output: str | Path,
    recipe: Recipe,
    *,
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 256,
    temperatures: Sequence[float] = (0.0,),
    decode_batch: int = 32,
    stop_token_ids: Sequence[int] = (),
    console: Console | None = None,
    **options: Any,
) -> list[dict]:
    """Lets `target` answer `conversations` into `output/answers.jsonl`, then trains `drafter` on the answers.

    An answers file that an earlier run of the same prompts left in `output` is continued.

    Args:
        max_prompt_tokens: longer prompts are left out.
        max_new_tokens: the longest answer.
        temperatures: every prompt is answered once per entry; 0 is greedy.
        decode_batch: prompts that are answered at a time.
        stop_token_ids: tokens that end an answer.
        options: `max_length`, `held_out` and `resume` of `train_on_answers`, which has the other arguments too.
    """
    console = console or Console(quiet=True)
    answers = Path(output) / "answers.jsonl"
    with progress(console, "the target answers", len(conversations) * len(temperatures)) as advance:
        dropped = regenerate(
            Target(target.model),  # untapped: answers need no features
            tokenizer,
            conversations,
            answers,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperatures=temperatures,
            batch_size=decode_batch,
            seed=recipe.seed,
            stop_token_ids=stop_token_ids,
            on_progress=advance,
        )
    if dropped:
        console.print(f"{dropped} prompts longer than {max_prompt_tokens} tokens were left out (--max-prompt-tokens)")
    return train_on_answers(drafter, target, answers, output, recipe, console=console, **options)


def train_on_answers(
    drafter: DFlashDrafter,
    target: Target,
    answers: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    max_length: int = 1024,
    held_out: float = 0.0,
    resume: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Splits the answers, trains `drafter`, saves it to `output` and draws `output/curve.png`.

    Args:
        target: tapped at the drafter's layers.
        answers: a file written by `dflash_ext.data.regenerate`.
        max_length: sequences are cut to this many tokens.
        held_out: the share of the prompts that is kept for evaluation.
        console: shows the progress and a summary; None shows nothing.

    Returns:
        The log of `train_drafter`, which has the other arguments too.
    """
    console = console or Console(quiet=True)
    dataset = ResponseDataset(answers, max_length, vocab_size=target.vocab_size)
    trained, kept_out = dataset.split(held_out, recipe.seed)
    console.print(f"answers: {len(trained)} to train on, {len(kept_out)} held out")
    log = train_drafter(drafter, target, trained, output, recipe, held_out=kept_out, resume=resume, console=console)
    plot_curve(log, Path(output) / "curve.png")
    console.print(summary(log))
    return log


def train_drafter(
    drafter: DFlashDrafter,
    target: Target,
    answers: Dataset,
    output: str | Path,
    recipe: Recipe,
    *,
    held_out: Dataset | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Trains `drafter` in place and saves it to `output` in the published layout.

    Args:
        drafter: float32 on the target's device; on a GPU it trains under bfloat16 autocast.
        answers: samples {"input_ids", "loss_mask"} of the target's own answers.
        held_out: answers to prompts that are not trained on; evaluated at the end.
        resume: go on from the last checkpoint in `output`, if there is one.
        console: shows the progress, the loss and tau; None shows nothing.

    Returns:
        The log: one dict per entry, with step, loss, tau, learning rate. It is also written to `output/training.json`.

    An interrupt saves the drafter as it stands before it is raised again.

    Raises:
        ValueError: the checkpoint to go on from is of another drafter.
    """
    output = Path(output)
    on_gpu = target.device.type == "cuda"
    config = drafter.config
    args = TrainingArguments(
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
        torch_compile=recipe.compile,
        logging_steps=min(recipe.log_every, recipe.steps),
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=1,
        seed=recipe.seed,
        data_seed=recipe.seed,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        dataloader_num_workers=4 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        label_names=["labels"],
        prediction_loss_only=True,
        disable_tqdm=True,
    )
    trainer = DFlashTrainer(
        drafter,
        target,
        gamma=recipe.gamma,
        args=args,
        train_dataset=answers,
        eval_dataset=held_out,
        data_collator=AnchorCollator(recipe.anchors, config.block_size, config.mask_token_id),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = get_last_checkpoint(str(output)) if resume and output.is_dir() else None
    if checkpoint:
        _check_checkpoint(checkpoint, config)
    try:
        with TrainingProgress(console or Console(quiet=True)) as shown:
            if trainer.is_world_process_zero():
                trainer.add_callback(shown)
            trainer.train(resume_from_checkpoint=checkpoint)
            if held_out is not None and len(held_out):
                trainer.evaluate()
    finally:
        log = [entry for entry in trainer.state.log_history if entry]
        if trainer.state.global_step:  # a run that failed at once leaves an earlier drafter alone
            save_drafter(drafter, output, dtype=torch.bfloat16)
            (output / "training.json").write_text(json.dumps({"recipe": asdict(recipe), "log": log}, indent=1) + "\n")
    return log


def _check_checkpoint(folder: str, config: DFlashConfig) -> None:
    saved = DFlashConfig.from_pretrained(folder)
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "block_size", "dflash_config"):
        mine, theirs = getattr(config, name), getattr(saved, name)
        if mine != theirs:
            raise ValueError(f"{folder} is of another drafter: its {name} is {theirs}, this one's is {mine}")


def save_drafter(drafter: DFlashDrafter, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes `config.json` and safetensors shards of at most 16 MB, in `dtype` (the drafter's own by default)."""
    if dtype not in (None, drafter.dtype):
        drafter = deepcopy(drafter).to(dtype)
    drafter.save_pretrained(folder, max_shard_size="16MB")
