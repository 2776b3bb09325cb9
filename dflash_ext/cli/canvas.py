"""`dflash-ext canvas`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import console, say
from .loading import asked, encode_for, load_canvas_model, load_drafter
from .options import (
    AnswersFile,
    ChatTemplateArgs,
    DecodeBatch,
    Device,
    Dtype,
    Field,
    Limit,
    MaxNewTokens,
    MaxPromptTokens,
    MinP,
    Prompts,
    PromptTexts,
    Seed,
    StopStrings,
    Tokenizer,
    TopK,
    TopP,
)
from .output import check_outputs, replacing, write_text

if TYPE_CHECKING:
    from ..decode.canvas import MaskedDiffusion, UniformDiffusion

CanvasModel = Annotated[
    str, typer.Option(help="A folder or hub name: a DiffusionGemma, or the causal LM that --denoiser adapts.")
]
DenoiserFolder = Annotated[
    Path | None,
    typer.Option("--denoiser", help="Folder of a denoiser that `dflash-ext adapt` has trained for the model."),
]
CanvasDrafter = Annotated[
    Path | None,
    typer.Option(
        "--drafter",
        metavar="<folder>",
        help="A DFlash drafter that `dflash-ext train --denoiser` has trained for the denoiser. Canvases begin with "
        "its drafts instead of noise.",
    ),
]
CanvasLength = Annotated[
    int | None,
    typer.Option(
        min=1, show_default=False, help="Tokens of a canvas. The default is DiffusionGemma's own, or else 32."
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Denoising steps of a canvas; in uniform-state diffusion the most of them. The default is 16, or 48.",
    ),
]


def canvas(
    model: CanvasModel,
    prompt: PromptTexts = None,
    denoiser: DenoiserFolder = None,
    drafter: CanvasDrafter = None,
    prompts: Prompts = None,
    field: Field = None,
    limit: Limit = None,
    max_prompt_tokens: MaxPromptTokens = 2048,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: MaxNewTokens = 256,
    canvas_length: CanvasLength = None,
    steps: Steps = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Masked diffusion: how many positions a step reveals: linear (the default) or cosine.",
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Masked diffusion: what is revealed first: the surest positions by their confidence (the default), "
            "margin or entropy, or left_to_right.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Masked diffusion: reveal all positions above this confidence, in place of a schedule."),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(
            help="Masked diffusion: reveal the n-th surest position while its confidence is at least 1 - factor / "
            "(n + 1), in place of a schedule."
        ),
    ] = None,
    entropy_bound: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="Accept the positions of the least entropy while those before add up to this, in nats. It is 0.1 in "
            "uniform-state diffusion; in masked diffusion it takes the place of a schedule.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, show_default=False, help="Masked diffusion: that of the draws, 1 by default; 0 is greedy."),
    ] = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    t_max: Annotated[
        float | None,
        typer.Option(show_default=False, help="Uniform-state diffusion: the first step's temperature, 0.8 by default."),
    ] = None,
    t_min: Annotated[
        float | None,
        typer.Option(
            show_default=False, help="Uniform-state diffusion: towards which the temperature falls, 0.4 by default."
        ),
    ] = None,
    stability: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default=False,
            help="Uniform-state diffusion: the steps for which the likeliest tokens must stay the same before a canvas "
            "may be done, 1 by default.",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            show_default=False,
            help="Uniform-state diffusion: the mean entropy, in nats, below which a canvas may be done, 0.005 by "
            "default; 0 makes all steps.",
        ),
    ] = None,
    stop: StopStrings = None,
    batch_size: DecodeBatch = 8,
    seed: Seed = 0,
    output: AnswersFile = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>", help="Write an HTML page that shows what each step accepted, drew anew and made final."
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode prompts by diffusion: canvases of tokens are denoised in steps, one canvas after the other."""
    from ..data import LeftOut
    from ..decode.canvas import decode_canvas
    from ..eval.canvas_trace import canvas_trace_page
    from ..models import stop_tokens

    left_out = LeftOut()
    conversations = asked("canvas", prompt, prompts, field, limit, left_out)
    check_outputs({"--output": output, "--trace": trace}, read=[prompts])
    loaded, pretrained, tok = load_canvas_model(model, denoiser, tokenizer, dtype, device)
    mask_id = getattr(loaded, "mask_id", None)
    shared = {"steps": steps, "entropy_bound": entropy_bound}
    masked = {"schedule": schedule, "order": order, "threshold": threshold, "factor": factor}
    masked |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    uniform = {"t_min": t_min, "t_max": t_max, "stability": stability, "confidence": confidence}
    process = _process(mask_id is not None, shared, masked, uniform)
    encoded = encode_for(
        getattr(loaded, "target", None),
        tok,
        conversations,
        prompts or "the prompts",
        left_out,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        chat_template_args=chat_template_args,
    )
    streaming = len(encoded) == 1 and not output

    decoded = decode_canvas(
        loaded,
        list(encoded.values()),
        process,
        canvas_length=canvas_length,
        drafter=load_drafter(drafter, pretrained),
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_tokens(tok, pretrained),
        stop_strings=stop,
        tokenizer=tok,
        seed=seed,
        batch_size=batch_size,
        tracing=trace is not None,
        on_text=write_text if streaming else None,
    )
    answers = list(zip(encoded, decoded.completions, strict=True))
    with replacing(output) if output else nullcontext() as file:
        for number, completion in answers:
            if file:
                row = {"index": number, "text": completion.text, "finish_reason": completion.finish_reason}
                file.write(json.dumps(row | {"steps": completion.steps}) + "\n")
            elif not streaming:
                console.rule(f"prompt {number + 1}")
                console.print(completion.text, markup=False, highlight=False)
    if streaming:
        print(flush=True)
    if trace:
        pages = [(f"prompt {number + 1}", tok.decode(encoded[number]), completion) for number, completion in answers]
        with replacing(trace) as page:
            page.write(canvas_trace_page(pages, tok.decode, title=f"{model}, step by step", mask_id=mask_id))
    made = sum(sum(completion.steps) for completion in decoded.completions)
    say(
        f"{decoded.tokens} tokens in {made} steps, {decoded.tokens / max(made, 1):.2f} a step, "
        f"{decoded.tokens_per_second:.1f} tokens/s"
    )


def _process(
    is_masked: bool, shared: dict[str, Any], masked: dict[str, Any], uniform: dict[str, Any]
) -> MaskedDiffusion | UniformDiffusion:
    """The process that the options describe; None is an option that was not given."""
    from ..decode.canvas import MaskedDiffusion, UniformDiffusion

    own, others = (masked, uniform) if is_masked else (uniform, masked)
    if wrong := [name for name, value in others.items() if value is not None]:
        has = "a" if is_masked else "no"
        raise ValueError(f"--{wrong[0].replace('_', '-')} does not fit this model, which has {has} mask token")
    given = {name: value for name, value in {**shared, **own}.items() if value is not None}
    if not is_masked:
        if given.get("confidence") == 0:
            given["confidence"] = None
        return UniformDiffusion(**given)
    if {"threshold", "factor", "entropy_bound"} & set(given):
        given.setdefault("schedule", None)
    return MaskedDiffusion(**given)
