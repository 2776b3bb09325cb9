"""`dflash-ext generate`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from .app import console, errors
from .loading import asked, encode_for, load_drafter_base, load_pair, load_target
from .options import (
    AnswersFile,
    AutoBlockSize,
    ChatTemplateArgs,
    DecodeBatch,
    DenoisingSteps,
    Device,
    DrafterBase,
    Dtype,
    Exact,
    Field,
    Forwards,
    FrequencyPenalty,
    GreedyDraft,
    Groups,
    Limit,
    LogitBias,
    MaxNewTokens,
    MaxPromptTokens,
    MinP,
    PresencePenalty,
    Prompts,
    PromptTexts,
    RepetitionPenalty,
    Seed,
    StopStrings,
    TargetName,
    Temperature,
    Tokenizer,
    TopK,
    TopP,
    refuse,
)
from .output import check_outputs, replacing, write_text

OF_DRAFTING = ("drafter_base", "block_size", "costs", "denoising_steps", "greedy_draft", "forwards", "groups")


def generate(
    ctx: typer.Context,
    target: TargetName,
    prompt: PromptTexts = None,
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="Folder or hub name of a DFlash drafter, or folder of a LoRA drafter. Without one, decoding is plain."
        ),
    ] = None,
    drafter_base: DrafterBase = None,
    prompts: Prompts = None,
    field: Field = None,
    limit: Limit = None,
    max_prompt_tokens: MaxPromptTokens = 2048,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    stop: StopStrings = None,
    block_size: AutoBlockSize = "auto",
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>",
            help="What cycles cost, for the block size 'auto': a JSON file, which is written if there is none. With "
            "the same file, a seed repeats its answers.",
        ),
    ] = None,
    denoising_steps: DenoisingSteps = 1,
    greedy_draft: GreedyDraft = False,
    forwards: Forwards = None,
    groups: Groups = None,
    batch_size: DecodeBatch = 8,
    seed: Seed = 0,
    exact: Exact = False,
    output: AnswersFile = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="<path>", help="Write an HTML page that shows what each cycle drafted, accepted and rejected."
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decode prompts, speculatively if there is a drafter."""
    from ..data import LeftOut
    from ..decode import decode
    from ..eval import table
    from ..eval.trace import trace_page
    from ..models import stop_tokens

    if drafter is None:
        refuse(ctx, OF_DRAFTING, "needs a drafter, which --drafter names")
    if costs and block_size != "auto":
        raise ValueError("--costs goes with --block-size auto, which chooses by them")
    left_out = LeftOut()
    conversations = asked("generate", prompt, prompts, field, limit, left_out)
    check_outputs({"--output": output, "--trace": trace, "--costs": costs}, read=[prompts])
    known_costs = _read_costs(costs) if costs and costs.exists() else None
    model, tok = load_target(target, tokenizer, dtype, device)
    tapped, draft = load_pair(model, drafter, load_drafter_base(drafter_base, model, tok))
    encoded = encode_for(
        tapped,
        tok,
        conversations,
        prompts or "the prompts",
        left_out,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        chat_template_args=chat_template_args,
    )
    numbers = list(encoded)
    streaming = len(conversations) == 1

    def finish(index: int, completion) -> None:
        number = numbers[index]
        if file:
            row = {
                "index": number,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "tau": completion.tau,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
        elif not streaming:
            console.rule(f"prompt {number + 1}")
            console.print(completion.text, markup=False, highlight=False)

    with replacing(output) if output else nullcontext() as file:
        decoded = decode(
            tapped,
            draft,
            list(encoded.values()),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            stop_token_ids=stop_tokens(tok, model),
            stop_strings=stop,
            tokenizer=tok,
            block_size=block_size,
            costs=known_costs,
            denoising_steps=denoising_steps,
            greedy_draft=greedy_draft,
            forwards=forwards,
            groups=groups,
            batch_size=batch_size,
            seed=seed,
            exact=exact,
            on_text=write_text if streaming else None,
            on_finish=finish,
        )
    if streaming:
        print(flush=True)
    if trace:
        answers = [
            (f"prompt {number + 1}", tok.decode(ids), completion)
            for (number, ids), completion in zip(encoded.items(), decoded.completions, strict=True)
        ]
        with replacing(trace) as page:
            page.write(trace_page(answers, tok.decode, title=f"{target}, cycle by cycle"))
    if costs and known_costs is None and decoded.costs:
        with replacing(costs) as file:
            file.write(json.dumps(decoded.costs, indent=1) + "\n")
    errors.print(table({"all prompts": decoded}))  # standard output has the answers alone


def _read_costs(path: Path) -> dict[int, dict[int, float]]:
    """The costs that an earlier run wrote: seconds by the number of rows and of drafted tokens."""
    try:
        tables = json.loads(path.read_text())
        return {int(rows): {int(k): float(seconds) for k, seconds in row.items()} for rows, row in tables.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} has no costs of cycles, such as --costs writes: {error}") from None
