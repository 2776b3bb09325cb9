"""The options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TargetName = Annotated[str, typer.Option(help="Folder or hub name of a causal LM; 'smollm2' is the packaged one.")]
Drafter = Annotated[Path | None, typer.Option(help="Folder of a DFlash drafter.")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Prompts or conversations as JSONL, a JSON array or plain text; of 'turns' the first is asked."),
]
Field = Annotated[str | None, typer.Option(help="The key that holds the prompt, where it is none of the usual ones.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU is used where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU) or float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything that is drawn at random.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
BlockSize = Annotated[int | None, typer.Option(help="Slots of a block, at most the drafter's own, the default.")]
RowsAtATime = Annotated[int, typer.Option(min=1, help="Prompts decoded at a time.")]
Tokenizer = Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the target.")]


def check_output(path: Path | None) -> None:
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--output {path}: a file in a folder that exists is expected")
