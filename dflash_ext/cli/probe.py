"""`dflash-ext probe`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from .app import console
from .loading import load_target
from .options import Device, Dtype, LinearLayers, Tokenizer, linear_layer_names

COLOURS = {"ok": "green", "note": "yellow", "wrong": "red"}


def probe(
    model: Annotated[str, typer.Option(help="A folder or hub name of a causal LM, or 'smollm2'.")],
    attention: Annotated[
        str, typer.Option(help="The attention implementation that training would use.")
    ] = "block_attn",
    linear_layers: LinearLayers = "all",
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Say whether a causal LM can be trained as a denoiser: masks, layers, adapter, mask token.

    One line is one verdict. The exit code is 1 if training would be wrong.
    """
    from .. import models

    loaded, tok = load_target(model, tokenizer, dtype, device)
    wrong = False
    for verdict in models.probe(loaded, tok, targets=linear_layer_names(linear_layers), implementation=attention):
        line = Text(f"{verdict.level:5} {verdict.subject}: {verdict.found}")
        line.stylize(COLOURS[verdict.level], 0, 5)
        console.print(line, soft_wrap=True)
        wrong |= verdict.level == "wrong"
    if wrong:
        raise typer.Exit(1)
