"""`dflash-ext eval reconstruct`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .adapt import PrefixShare, RowLength, Span, Text, share
from .app import console
from .loading import load_target
from .options import AttentionName, Device, Dtype, FiguresFile, Plot, Seed, Tokenizer
from .output import check_outputs, replacing

ModelName = Annotated[str, typer.Option(help="The denoisers' base: a folder or hub name of a causal LM, or 'smollm2'.")]


def reconstruct(
    model: ModelName,
    denoiser: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>",
            help="A folder of `dflash-ext adapt`. Repeat the option to compare several with the first one.",
        ),
    ],
    text: Text,
    mask_rate: Annotated[
        list[float] | None,
        typer.Option(
            min=0.001,
            max=1,
            metavar="<share>",
            help="The share of each denoising block that is hidden. Repeat the option for several rates. The "
            "default is 0.15, 0.25 and 0.5.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="The largest number of rows, from the start of the text.")] = 64,
    prefix_share: PrefixShare = "0.5",
    span: Span = 3.0,
    length: RowLength = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
    attention: AttentionName = "block_attn",
    output: FiguresFile = None,
    plot: Plot = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Hide tokens of real text, and report how well denoisers fill them in.

    The text should be other than that of the training.
    """
    from ..data import TextDataset
    from ..eval import reconstruction
    from ..eval.plot import check_plot
    from ..models import Target, load_adaptation
    from ..progress import progress

    check_outputs({"--output": output, "--plot": plot}, read=text)
    if plot:
        check_plot(plot)
    prefix = share(prefix_share, "--prefix-share")
    rates = mask_rate or [0.15, 0.25, 0.5]
    if len(names := [path.resolve().name for path in denoiser]) > len(set(names)):
        raise ValueError(f"denoisers are named after their folders, and two of {', '.join(names)} have the same name")
    loaded, tok = load_target(model, tokenizer, dtype, device)
    target = Target(loaded)
    target.decoder.set_attn_implementation(attention)
    target.check_length(length, f"rows of {length} tokens")
    adaptations = {name: load_adaptation(path, target) for name, path in zip(names, denoiser, strict=True)}
    dataset = TextDataset.of_files(text, tok, length).first(rows)
    results = {}
    for name, adaptation in adaptations.items():
        with progress(console, f"{name} fills in", len(rates) * len(dataset)) as advance:
            results[name] = reconstruction.reconstruct(
                adaptation,
                dataset,
                rates,
                span=span,
                prefix=prefix,
                batch_size=batch_size,
                seed=seed,
                on_progress=advance,
            )
    console.print(reconstruction.table(results, seed))
    if output:
        with replacing(output) as file:
            settings = {"rows": len(dataset), "length": length, "span": span, "prefix_share": prefix_share}
            told = {"settings": settings, "denoisers": reconstruction.figures(results, seed)}
            file.write(json.dumps(told, indent=1) + "\n")
        console.print(f"the figures are in {output}")
    if plot:
        reconstruction.plot_reconstruction(results, plot, seed)
        console.print(f"the plot is in {plot}")
