"""`dflash-ext demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import console
from .options import AtLeastTwoNewTokens


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only the first part, the tiny model. It takes less than two minutes.")
    ] = False,
    canvas: Annotated[
        bool,
        typer.Option("--canvas", help="Adapt the tiny model to masked diffusion instead, and decode canvases with it."),
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="The number of prompts that SmolLM2 answers.")] = 6,
    max_new_tokens: AtLeastTwoNewTokens = 128,
) -> None:
    """Train a tiny model and decode with it, then with SmolLM2."""
    from ..demo import canvas_model, real_model, tiny_model

    if canvas:
        canvas_model(console)
        return
    tiny_model(console)
    if not quick:
        real_model(console, count=prompts, max_new_tokens=max_new_tokens)
