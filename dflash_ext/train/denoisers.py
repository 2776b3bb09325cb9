"""Trains a denoiser: a causal LM that fills in hidden tokens of text, through an adapter."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from ..data import NoiseCollator, TextDataset, check_blocks
from ..models import Adaptation, UniformAdaptation, save_adaptation
from ..progress import counted
from .evaluation import Evaluation
from .objectives import DenoisingObjective, UniformObjective
from .recipe import RunRecipe
from .run import run


def train_denoiser(
    adaptation: Adaptation,
    text: TextDataset,
    output: str | Path,
    recipe: RunRecipe,
    *,
    collator: NoiseCollator,
    held_out: TextDataset | None = None,
    ar_weight: float = 0.0,
    kl_weight: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[dict]:
    """Trains `adaptation` in place on rows of text, and saves it to `output`.

    Args:
        adaptation: float32 on the target's device; on a GPU it trains under bfloat16 autocast.
        collator: hides tokens of the rows, or replaces them (`UniformCollator`) for a `UniformAdaptation`. With the
            pattern block_causal it draws noise for each block of its own.
        held_out: rows to measure the loss on, `recipe.evaluate_every` steps apart; the best adaptation is then kept.
        ar_weight, kl_weight: as in `DenoisingObjective`.
        resume, overwrite, console: as in `run`, whose log is returned.

    Raises:
        ValueError: the rows are longer than the base's positions, no document is long enough to be denoised, or as in
            `run` and `DenoisingObjective`.
    """
    adaptation.target.check_length(text.length, f"rows of {text.length} tokens")
    check_blocks(text)
    if held_out is not None:
        check_blocks(held_out)
    mask_id = adaptation.config.mask_id
    if console is not None and mask_id is not None and (times := text.count(mask_id)):
        console.print(
            f"the text has the mask token {mask_id} in {counted(times, 'place')}, and a denoiser never writes it: "
            "choose another one if it should",
            soft_wrap=True,
        )

    def save(folder: Path) -> None:
        if PartialState().is_main_process:
            save_adaptation(adaptation, folder, base_name=adaptation.target.model.name_or_path or None)

    if isinstance(adaptation, UniformAdaptation):
        if kl_weight:
            raise ValueError("with uniform noise there is no divergence from the base: kl_weight must be 0")
        objective = UniformObjective(adaptation, ar_weight=ar_weight)
    else:
        objective = DenoisingObjective(adaptation, ar_weight=ar_weight, kl_weight=kl_weight)
    evaluation = None
    if held_out is not None:
        evaluation = Evaluation(held_out, collator, recipe.batch_size, recipe.seed)
    return run(
        objective,
        text,
        output,
        recipe,
        collator=collator,
        save=save,
        evaluation=evaluation,
        resume=resume,
        overwrite=overwrite,
        console=console,
    )
