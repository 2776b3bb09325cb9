"""`dflash-ext features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .loading import load_target
from .options import Device, Dtype, MaxLength, Taps, TargetName, Tokenizer, tap_choice
from .output import check_folder


def features(
    target: TargetName,
    answers: Annotated[Path, typer.Option(help="The answers file of a training run.")],
    output: Annotated[Path, typer.Option(help="The folder for the features. One that was begun is continued.")],
    taps: Taps = None,
    max_length: MaxLength = 1024,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write the target's features of answers, for training with `train --features`."""
    from ..data import AnswerDataset, write_features
    from ..data.parsing import require_file
    from ..models import Target, default_taps
    from ..progress import progress

    chosen = tap_choice(taps)
    check_folder(output)
    require_file(answers)
    model, _ = load_target(target, tokenizer, dtype, device)
    plain = Target(model)
    tapped = Target(model, chosen if isinstance(chosen, list) else default_taps(plain.num_layers, chosen))
    dataset = AnswerDataset(answers, max_length, target=tapped)
    with progress(console, "features of answers", len(dataset)) as advance:
        write_features(tapped, dataset, output, on_progress=advance)
    console.print(f"the features of {len(dataset)} answers at layers {list(tapped.tap_ids)} are in {output}")
