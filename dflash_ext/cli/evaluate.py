"""`dflash-ext evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .loading import encode_for, load_pair, load_target
from .options import (
    AtLeastTwoNewTokens,
    BlockSize,
    ChatTemplateArgs,
    DecodeBatch,
    DenoisingSteps,
    Device,
    Dtype,
    Exact,
    Field,
    GreedyDraft,
    Limit,
    MaxPromptTokens,
    MinP,
    Seed,
    TargetName,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
)
from .output import check_output, replacing


def evaluate(
    target: TargetName,
    drafter: Annotated[Path, typer.Option(help="Folder or hub name of the DFlash drafter to measure.")],
    prompts: Annotated[
        list[Path],
        typer.Option(
            metavar="<path>", help="A file of prompts, which is one prompt set. Repeat the option for several sets."
        ),
    ],
    compare: Annotated[
        Path | None,
        typer.Option(help="Decode the same prompts with this drafter, too, and report how much its tau differs."),
    ] = None,
    field: Field = None,
    limit: Limit = 80,
    max_prompt_tokens: MaxPromptTokens = 2048,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: AtLeastTwoNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    block_size: BlockSize = None,
    denoising_steps: DenoisingSteps = 1,
    greedy_draft: GreedyDraft = False,
    batch_size: DecodeBatch = 8,
    seed: Seed = 0,
    exact: Exact = False,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode prompt sets, and report tau and acceptance rates.

    A set is decoded with the drafter's own block, and once more with the block size "auto", unless a size or a
    second drafter is given.
    """
    from ..data import LeftOut, read_conversations
    from ..decode import Decoded, decode
    from ..eval import summarize, table, tau_difference
    from ..models import stop_tokens
    from ..progress import progress

    if len(names := [path.stem for path in prompts]) > len(set(names)):
        raise ValueError(f"prompt sets are named after their files, and two of {', '.join(names)} have the same name")
    left_out = {path.stem: LeftOut() for path in prompts}
    conversations = {
        path.stem: read_conversations(path, field=field, limit=limit, left_out=left_out[path.stem]) for path in prompts
    }
    check_output(output)
    model, tok = load_target(target, tokenizer, dtype, device)
    pairs = [load_pair(model, path) for path in (drafter, compare) if path]
    encoded = {
        path.stem: encode_for(
            pairs[0][0],
            tok,
            conversations[path.stem],
            path,
            left_out[path.stem],
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            chat_template_args=chat_template_args,
        )
        for path in prompts
    }
    results: list[dict[str, Decoded]] = [{} for _ in pairs]
    sizes = {"": block_size} if block_size or compare or pairs[0][1] is None else {"": None, ", auto": "auto"}
    runs = {f"{name}{suffix}": (name, size) for name in encoded for suffix, size in sizes.items()}
    try:
        for run, (name, size) in runs.items():
            for (tapped, draft), decoded in zip(pairs, results, strict=True):
                with progress(console, run, len(encoded[name])) as advance:
                    decoded[run] = decode(
                        tapped,
                        draft,
                        list(encoded[name].values()),
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        min_p=min_p,
                        stop_token_ids=stop_tokens(tok, model),
                        block_size=size,
                        denoising_steps=denoising_steps,
                        greedy_draft=greedy_draft,
                        batch_size=batch_size,
                        seed=seed,
                        exact=exact,
                        on_finish=lambda *_: advance(1),
                    )
    finally:  # an interrupt loses only the set that it interrupts
        for path, decoded in zip((drafter, compare), results, strict=False):
            console.print(table(decoded, title=str(path) if compare else None))
    rows = {run: summarize(decoded) | {"left_out": left_out[runs[run][0]]} for run, decoded in results[0].items()}
    for name, other in results[1].items() if compare else ():
        difference = tau_difference(results[0][name], other, seed=seed)
        console.print(f"{name}: {difference}", soft_wrap=True, highlight=False)
        rows[name] |= {"compared": summarize(other), "tau_difference": difference._asdict()}
    if output:
        with replacing(output) as file:
            file.write(json.dumps(rows, indent=1) + "\n")
        console.print(f"the figures are in {output}")
