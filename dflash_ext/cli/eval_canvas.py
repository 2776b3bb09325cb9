"""`dflash-ext eval canvas`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .canvas import CanvasLength, CanvasModel, DenoiserFolder
from .loading import encode_for, load_canvas_model, load_target
from .options import (
    ChatTemplateArgs,
    DecodeBatch,
    Device,
    Dtype,
    Field,
    FiguresAndAnswersFile,
    Limit,
    MaxNewTokens,
    MaxPromptTokens,
    Seed,
    Temperature,
    Tokenizer,
)
from .output import check_output, replacing


def canvas_front(
    model: CanvasModel,
    prompts: Annotated[Path, typer.Option(metavar="<path>", help="A file of prompts or conversations.")],
    denoiser: DenoiserFolder = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="<n>", help="Denoising steps of a canvas. Repeat the option; the default is 4, 8, 16 and 32."
        ),
    ] = None,
    process: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="Settings of MaskedDiffusion or UniformDiffusion, such as "
            """'{"order": "left_to_right"}'. Repeat the option for several; each is run at all numbers of steps.""",
        ),
    ] = None,
    field: Field = None,
    limit: Limit = 32,
    max_prompt_tokens: MaxPromptTokens = 1024,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: MaxNewTokens = 128,
    canvas_length: CanvasLength = None,
    temperature: Temperature = 1.0,
    batch_size: DecodeBatch = 8,
    seed: Seed = 0,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="<name>",
            help="Another causal LM with the same tokenizer, which judges the answers and is decoded beside them. The "
            "default is the denoiser's base.",
        ),
    ] = None,
    output: FiguresAndAnswersFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="<path>", help="Draw quality against speed into this PNG or SVG file.")
    ] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode prompts by diffusion at several numbers of steps, and report quality and speed.

    The base, which decodes token by token, is shown beside them and judges all answers.
    """
    from ..data import LeftOut, read_conversations
    from ..eval import canvas_front as front
    from ..eval.plot import check_plot
    from ..models import Target, stop_tokens

    left_out = LeftOut()
    conversations = read_conversations(prompts, field=field, limit=limit, left_out=left_out)
    check_output(output)
    check_output(plot, "--plot")
    if plot:
        check_plot(plot)
    loaded, pretrained, tok = load_canvas_model(model, denoiser, tokenizer, dtype, device)
    base = Target(pretrained) if denoiser else None
    if judge:
        base = Target(load_target(judge, tokenizer, dtype, device)[0])
    encoded = encode_for(
        getattr(loaded, "target", None),
        tok,
        conversations,
        prompts,
        left_out,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        chat_template_args=chat_template_args,
    )
    is_masked = getattr(loaded, "mask_id", None) is not None
    with console.status("decoding") as status:
        points = front.canvas_front(
            loaded,
            base,
            tok,
            list(encoded.values()),
            _processes(process or ["{}"], steps or [4, 8, 16, 32], is_masked=is_masked),
            temperature=temperature,
            canvas_length=canvas_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_tokens(tok, pretrained),
            batch_size=batch_size,
            seed=seed,
            on_progress=lambda name: status.update(f"decoding: {name}"),
        )
    console.print(front.table(points))
    if output:
        with replacing(output) as file:
            file.write(json.dumps(front.figures(points), indent=1) + "\n")
        console.print(f"the figures are in {output}")
    if plot:
        front.plot_front(points, plot)
        console.print(f"the plot is in {plot}")


def _processes(settings: list[str], steps: list[int], *, is_masked: bool) -> dict:
    """The processes by what tells them apart: their settings and their steps."""
    from ..decode.canvas import MaskedDiffusion, UniformDiffusion

    found = {}
    for text in settings:
        try:
            given = json.loads(text)
            process = (MaskedDiffusion if is_masked else UniformDiffusion)(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--process {text}: {error}") from None
        told = "".join(f", {name} {value}" for name, value in given.items())
        found |= {f"{count} steps{told}": replace(process, steps=count) for count in steps}
    return found
