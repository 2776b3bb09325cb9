"""`dflash-ext demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import console
from .loading import no_bars_for_weights


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the part that trains a tiny model, under two minutes.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts the real model answers.")] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of its answers.")] = 128,
) -> None:
    """Trains and decodes on the spot, then decodes with a real model and a real drafter."""
    from ..demo import real_model, tiny_model

    no_bars_for_weights()
    tiny_model(console)
    if not quick:
        real_model(console, count=prompts, max_new_tokens=max_new_tokens)
