"""`dflash-ext demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import console
from .loading import no_bars_for_weights


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only the first part, which trains a tiny model in under two minutes.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="The number of prompts that the real model answers.")] = 6,
    max_new_tokens: Annotated[
        int, typer.Option(min=2, help="The largest number of tokens in an answer of the real model.")
    ] = 128,
) -> None:
    """Train a tiny model and its drafter and decode with them, then decode with a real model and its drafter."""
    from ..demo import real_model, tiny_model

    no_bars_for_weights()
    tiny_model(console)
    if not quick:
        real_model(console, count=prompts, max_new_tokens=max_new_tokens)
