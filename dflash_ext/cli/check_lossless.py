"""`dflash-ext check-lossless`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import console, say
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
    Forwards,
    GreedyDraft,
    Groups,
    Limit,
    MaxPromptTokens,
    Seed,
    TargetName,
    Tokenizer,
)


def check_lossless(
    target: TargetName,
    drafter: Annotated[Path, typer.Option(help="Folder or hub name of the drafter to check.")],
    prompts: Annotated[Path, typer.Option(metavar="<path>", help="A file of prompts.")],
    drafter_base: DrafterBase = None,
    field: Field = None,
    limit: Limit = 20,
    max_prompt_tokens: MaxPromptTokens = 2048,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: AtLeastTwoNewTokens = 128,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Differences of at most this regret, in nats, count as ties of rounding.")
    ] = 0.1,
    draws: Annotated[
        int,
        typer.Option(
            min=0, help="Also sample this number of answers to the first prompt, and test their distribution; 0: none."
        ),
    ] = 1000,
    temperature: Annotated[float, typer.Option(min=1e-3, help="The temperature of these draws.")] = 1.0,
    block_size: BlockSize = None,
    denoising_steps: DenoisingSteps = 1,
    greedy_draft: GreedyDraft = False,
    forwards: Forwards = None,
    groups: Groups = None,
    batch_size: DecodeBatch = 8,
    seed: Seed = 0,
    exact: Exact = False,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Check that a drafter leaves the target's output as it is. The exit code is 1 if it does not."""
    from ..data import LeftOut, read_conversations
    from ..eval.lossless import LARGEST_Z, greedy_divergences, sampling_z
    from ..models import stop_tokens
    from ..progress import progress

    left_out = LeftOut()
    conversations = read_conversations(prompts, field=field, limit=limit, left_out=left_out)
    model, tok = load_target(target, tokenizer, dtype, device)
    tapped, draft = load_pair(model, drafter, load_drafter_base(drafter_base, model, tok))
    encoded = encode_for(
        tapped,
        tok,
        conversations,
        prompts,
        left_out,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max(max_new_tokens, 3),
        chat_template_args=chat_template_args,
    )
    numbers, asked = list(encoded), list(encoded.values())
    drafting = {"block_size": block_size, "denoising_steps": denoising_steps, "greedy_draft": greedy_draft}
    options = drafting | {"forwards": forwards, "groups": groups, "batch_size": batch_size, "exact": exact}
    stops = stop_tokens(tok, model)
    with progress(console, "decoding greedily", 2 * len(asked)) as advance:  # plainly, too
        options["on_finish"] = lambda *_: advance(1)
        found = greedy_divergences(tapped, draft, asked, max_new_tokens=max_new_tokens, stop_token_ids=stops, **options)
    wrong = [each for each in found if each.regret > tolerance]
    console.print(f"greedy: {len(asked) - len(found)} of {len(asked)} answers are equal token by token")
    for each in found:
        plain, other = (tok.decode([token]) for token in (each.plain, each.speculative))
        verdict = "wrong" if each.regret > tolerance else "a tie of rounding"
        line = f"  prompt {numbers[each.prompt] + 1}, token {each.position + 1}: {plain!r} plainly, {other!r} with the"
        console.print(f"{line} drafter, regret {each.regret:.3f} nats: {verdict}", soft_wrap=True, markup=False)
    z = None
    if draws:
        with progress(console, "sampling answers", draws) as advance:
            options["on_finish"] = lambda *_: advance(1)
            z = sampling_z(tapped, draft, asked[0], draws=draws, temperature=temperature, seed=seed, **options)
        compared = f"the second token of {draws} answers"
        if z is None:
            told = f"{compared} says nothing at this temperature: no two tokens are expected in 5 of them each"
        else:
            fits = "fits" if z <= LARGEST_Z else "does not fit"
            told = f"{compared} {fits} the target's distribution (z = {z:.2f})"
        console.print(f"sampling: {told}", soft_wrap=True)
    if wrong or (z is not None and z > LARGEST_Z):
        say("dflash-ext: the output is not the target's own", style="red")
        raise typer.Exit(1)
