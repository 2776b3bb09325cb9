"""`dflash-ext eval canvas`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .canvas import CanvasDrafter, CanvasLength, CanvasModel
from .loading import encode_for, load_canvas_model, load_drafter, load_target
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
    Tokenizer,
)
from .output import check_outputs, replacing


def canvas_front(
    model: CanvasModel,
    prompts: Annotated[Path, typer.Option(metavar="<path>", help="A file of prompts or conversations.")],
    denoiser: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="<path>",
            help="Folder of a denoiser that `dflash-ext adapt` has trained for the model; several may be given.",
        ),
    ] = None,
    drafter: CanvasDrafter = None,
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
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            metavar="<float>",
            help="The temperature of the base's own decoding, 1 by default; 0 is greedy. Several may be given.",
        ),
    ] = None,
    references: Annotated[
        str | None,
        typer.Option(
            metavar="<key>",
            help="The key under which the rows of the file have right answers, such as GSM8K's 'answer'. An answer is "
            "right if its last number is that of the right answer.",
        ),
    ] = None,
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
    from .. import models
    from ..data import LeftOut, read_conversations, read_references
    from ..eval import canvas_front as front
    from ..eval.plot import check_plot

    left_out = LeftOut()
    conversations = read_conversations(prompts, field=field, limit=limit, left_out=left_out)
    right = read_references(prompts, references) if references else []
    check_outputs({"--output": output, "--plot": plot}, read=[prompts])
    if plot:
        check_plot(plot)
    folders = denoiser or [None]
    if len(names := [folder and folder.resolve().name for folder in folders]) > len(set(names)):
        raise ValueError(f"denoisers are named after their folders, and two of {', '.join(names)} have the same name")
    loaded, pretrained, tok = load_canvas_model(model, folders[0], tokenizer, dtype, device)
    base = models.Target(pretrained) if denoiser else None
    if judge:
        base = models.Target(load_target(judge, tokenizer, dtype, device)[0])
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
    judged = front.Judged(
        list(encoded.values()),
        tok,
        base,
        references=[right[conversations[index].row] for index in encoded] if right else [],
        max_new_tokens=max_new_tokens,
        stop_token_ids=models.stop_tokens(tok, pretrained),
        batch_size=batch_size,
        seed=seed,
    )
    decoding = {"canvas_length": canvas_length, "drafter": load_drafter(drafter, pretrained)}
    points = {}
    with console.status("decoding") as status:
        options = {"on_progress": lambda name: status.update(f"decoding: {name}")}
        for name, folder in zip(names, folders, strict=True):
            if folder != folders[0]:
                loaded = models.load_denoiser(pretrained, folder)
            is_masked = getattr(loaded, "mask_id", None) is not None
            processes = _processes(process or ["{}"], steps or [4, 8, 16, 32], is_masked=is_masked)
            found = front.canvas_points(loaded, judged, processes, **decoding, **options)
            points |= {f"{name}, {each}" if len(folders) > 1 else each: point for each, point in found.items()}
        points |= front.base_points(judged, temperature or [1.0], **options)
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
    from ..decode.canvas import MaskedDiffusion, UniformDiffusion, process_of

    found = {}
    for text in settings:
        try:
            given = json.loads(text)
            process = process_of(MaskedDiffusion if is_masked else UniformDiffusion, given)
            if "steps" in given:
                raise ValueError("the number of steps is that of --steps")
        except (TypeError, ValueError) as error:
            raise ValueError(f"--process {text}: {error}") from None
        told = "".join(f", {name} {value}" for name, value in given.items())
        found |= {f"{count} steps{told}": replace(process, steps=count) for count in steps}
    return found
