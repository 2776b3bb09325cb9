"""`dflash-ext evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .loading import encode_for, load_drafter_base, load_pair, load_target
from .options import (
    AtLeastTwoNewTokens,
    BlockSize,
    ChatTemplateArgs,
    DecodeBatch,
    DenoisingSteps,
    Device,
    DrafterBase,
    Dtype,
    Exact,
    Field,
    FiguresFile,
    Forwards,
    GreedyDraft,
    Groups,
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
from .output import check_outputs, replacing


def evaluate(
    target: TargetName,
    drafter: Annotated[Path, typer.Option(help="Folder or hub name of the drafter to measure.")],
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
    drafter_base: DrafterBase = None,
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
    forwards: Forwards = None,
    groups: Groups = None,
    batch_size: DecodeBatch = 8,
    seed: Seed = 0,
    exact: Exact = False,
    tau_only: Annotated[
        bool, typer.Option("--tau-only", help="Leave out the runs with the block size 'auto' and of plain decoding.")
    ] = False,
    output: FiguresFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="<path>", help="Draw acceptance rates and speeds into this PNG or SVG file."),
    ] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode prompt sets, and report tau, acceptance rates and speed.

    A set is decoded with the drafter's own block, with the block size "auto" and plainly. With --block-size it is
    decoded with that size and plainly, and with --compare by both drafters alone.
    """
    from ..data import LeftOut, read_conversations
    from ..decode import Decoded, decode
    from ..eval import summarize, table, tau_difference
    from ..eval.plot import check_plot, plot_evaluation
    from ..models import stop_tokens
    from ..progress import progress

    if len(names := [path.stem for path in prompts]) > len(set(names)):
        raise ValueError(f"prompt sets are named after their files, and two of {', '.join(names)} have the same name")
    left_out = {path.stem: LeftOut() for path in prompts}
    conversations = {
        path.stem: read_conversations(path, field=field, limit=limit, left_out=left_out[path.stem]) for path in prompts
    }
    check_outputs({"--output": output, "--plot": plot}, read=prompts)
    if plot:
        check_plot(plot)
    model, tok = load_target(target, tokenizer, dtype, device)
    base = load_drafter_base(drafter_base, model, tok)
    tapped, draft = load_pair(model, drafter, base)
    # By its name, the pair and the block size of each run. The first one is that of the drafter itself.
    runs = {"auto" if block_size == "auto" else "drafter": (tapped, draft, block_size)}
    if compare:
        runs["compared"] = (*load_pair(model, compare, base), block_size)
    elif not tau_only:
        if block_size is None:
            runs["auto"] = tapped, draft, "auto"
        runs["plain"] = *load_pair(model, None), None
    encoded = {
        path.stem: encode_for(
            tapped,
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
    results: dict[str, dict[str, Decoded]] = {}
    try:
        for name, asked in encoded.items():
            for run, (verifier, drafting, size) in runs.items():
                with progress(console, f"{name}, {run}", len(asked)) as advance:
                    decoded = decode(
                        verifier,
                        drafting,
                        list(asked.values()),
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        min_p=min_p,
                        stop_token_ids=stop_tokens(tok, model),
                        block_size=size,
                        denoising_steps=denoising_steps,
                        greedy_draft=greedy_draft,
                        forwards=forwards if drafting else None,
                        groups=groups if drafting else None,
                        batch_size=batch_size,
                        seed=seed,
                        exact=exact,
                        on_finish=lambda *_: advance(1),
                    )
                results.setdefault(name, {})[run] = decoded
    finally:  # an interrupt loses only the run that it interrupts
        rows = {f"{name}, {run}": decoded for name, each in results.items() for run, decoded in each.items()}
        if rows:
            console.print(table(rows))
    figures = {}
    for name, each in results.items():
        first, *others = each
        row = summarize(each[first]) | {run: summarize(each[run]) for run in others} | {"left_out": left_out[name]}
        if compare:
            difference = tau_difference(each[first], each["compared"], seed=seed)
            console.print(f"{name}: {difference}", soft_wrap=True, highlight=False)
            row["tau_difference"] = difference._asdict()
        if "plain" in each and (plain := each["plain"].tokens_per_second):
            speeds = {run: decoded.tokens_per_second for run, decoded in each.items() if run != "plain"}
            row["times_plain"] = {run: round(speed / plain, 3) for run, speed in speeds.items()}
            told = ", ".join(f"{times:.2f}x ({run})" for run, times in row["times_plain"].items())
            console.print(f"{name}: tokens/s of plain decoding: {told}", soft_wrap=True, highlight=False)
        figures[name] = row
    if output:
        with replacing(output) as file:
            file.write(json.dumps(figures, indent=1) + "\n")
        console.print(f"the figures are in {output}")
    if plot:
        plot_evaluation(results, plot)
        console.print(f"the plot is in {plot}")
