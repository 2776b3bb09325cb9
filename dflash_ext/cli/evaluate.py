"""`dflash-ext evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .loading import load_pair, load_target
from .options import (
    BlockSize,
    Device,
    Drafter,
    Dtype,
    Field,
    RowsAtATime,
    Seed,
    TargetName,
    Temperature,
    Tokenizer,
    check_output,
)


def evaluate(
    target: TargetName,
    drafter: Drafter,
    prompts: Annotated[list[Path], typer.Option(help="A prompt set, a file as for train; repeat for several.")],
    field: Field = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first prompts of each set.")] = 80,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of an answer that nothing stops before.")] = 256,
    temperature: Temperature = 0.0,
    block_size: BlockSize = None,
    batch_size: RowsAtATime = 8,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON.")] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measures tau and acceptance by position on prompt sets, by real decoding."""
    from ..data import encode, read_conversations
    from ..decode import decode
    from ..eval import figures, table
    from ..models import stop_tokens
    from ..progress import progress

    if len(names := [path.stem for path in prompts]) > len(set(names)):
        raise ValueError(f"prompt sets are named by their files, and two of {', '.join(names)} have one name")
    sets = {path.stem: read_conversations(path, field=field, limit=limit) for path in prompts}
    check_output(output)
    model, tok = load_target(target, tokenizer, dtype, device)
    tapped, draft = load_pair(model, drafter)
    results = {}
    for name, conversations in sets.items():
        encoded = [encode(c, tok, max_prompt_tokens=2048) for c in conversations]
        with progress(console, name, len(encoded)) as advance:
            results[name] = decode(
                tapped,
                draft,
                encoded,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_token_ids=stop_tokens(tok, model),
                block_size=block_size,
                batch_size=batch_size,
                seed=seed,
                on_finish=lambda *_: advance(1),
            )
    console.print(table(results))
    if output:
        output.write_text(json.dumps({name: figures(decoded) for name, decoded in results.items()}, indent=1) + "\n")
        console.print(f"the figures are in {output}")
