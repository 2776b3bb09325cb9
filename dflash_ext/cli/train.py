"""`dflash-ext train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .loading import load_target
from .options import Device, Dtype, Field, Prompts, Seed, TargetName, Tokenizer


def train(
    output: Annotated[Path, typer.Option(help="Folder for the drafter, its log and the answers.")],
    target: TargetName,
    prompts: Prompts = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers of an earlier run to train on, instead of prompts.")
    ] = None,
    field: Field = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are left out.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Length of the target's answers.")] = 256,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of the answers, greedy by default; repeat for several each.")
    ] = None,
    decode_batch: Annotated[int, typer.Option(min=1, help="Prompts answered at a time.")] = 32,
    mask_token: Annotated[
        str | None, typer.Option(help="The mask token, by text or id, if the tokenizer has none.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the drafter.")] = 5,
    taps: Annotated[str, typer.Option(help="How many layers of the target to tap, or their ids: 1,9,17.")] = "5",
    block_size: Annotated[int, typer.Option(help="Slots of a block, the anchor included.")] = 16,
    intermediate_size: Annotated[int | None, typer.Option(min=1, help="Width of its MLPs; the target's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks drawn from each sequence.")] = 64,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens of a training sequence.")] = 1024,
    learning_rate: Annotated[float, typer.Option(min=0, help="Its peak; a cosine decay follows.")] = 6e-4,
    gamma: Annotated[
        float | None, typer.Option(help="Decay of the position weights; D-PACE weights if not given.")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="Share of the prompts kept for evaluation.")] = 0.02,
    compile: Annotated[bool, typer.Option("--compile", help="Train under torch.compile.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint, if it has one.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 for none.")] = 0,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Trains a drafter for a target on the target's own answers to your prompts."""
    from ..data import read_conversations
    from ..data.parsing import require_file
    from ..models import DFlashDrafter, Target, stop_tokens
    from ..train import Recipe, train_on_answers, train_on_prompts

    if (prompts is None) == (answers is None):
        raise ValueError("train needs either --prompts, which the target answers first, or --answers")
    # Whatever can be wrong without the target is found before it is loaded.
    if answers is None:
        conversations = read_conversations(prompts, field=field, limit=limit)
    else:
        require_file(answers)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: a folder is expected, this is a file")
    tap_choice = [_integer(t, "--taps") for t in taps.split(",")] if "," in taps else _integer(taps, "--taps")
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        anchors=anchors,
        learning_rate=learning_rate,
        gamma=gamma,
        seed=seed,
        save_every=save_every,
        compile=compile,
    )
    model, tok = load_target(target, tokenizer, dtype, device)
    drafter = DFlashDrafter.for_target(
        Target(model),
        mask_token_id=_mask_token(tok, mask_token),
        num_layers=layers,
        block_size=block_size,
        taps=tap_choice,
        intermediate_size=intermediate_size,
    ).to(model.device)
    parameters = sum(p.numel() for p in drafter.parameters())
    console.print(
        f"drafter: {layers} layers, {parameters / 1e6:.1f} M parameters, taps {drafter.config.target_layer_ids}"
    )
    tapped = Target(model, drafter.config.target_layer_ids)
    options = dict(max_length=max_length, held_out=held_out, resume=resume, console=console)
    if answers is not None:
        train_on_answers(drafter, tapped, answers, output, recipe, **options)
    else:
        train_on_prompts(
            drafter,
            tapped,
            tok,
            conversations,
            output,
            recipe,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperatures=tuple(temperature or (0.0,)),
            decode_batch=decode_batch,
            stop_token_ids=stop_tokens(tok, model),
            **options,
        )
    console.print(f"the drafter is in {output}")


def _integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} is '{text}': a number is expected") from None


def _mask_token(tokenizer, given: str | None) -> int:
    """The id of the mask token: as given by text or id, or the tokenizer's own."""
    if given is None:
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token: name a spare one, by text or id, with --mask-token")
        return tokenizer.mask_token_id
    if given.isascii() and given.isdigit():
        return int(given)
    token = tokenizer.convert_tokens_to_ids(given)
    if token is None or token == tokenizer.unk_token_id:
        raise ValueError(f"mask token '{given}' is not in the tokenizer's vocabulary")
    return token
