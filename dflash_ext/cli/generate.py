"""`dflash-ext generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import console, errors
from .loading import load_pair, load_target
from .options import (
    BlockSize,
    Device,
    Drafter,
    Dtype,
    Field,
    Prompts,
    RowsAtATime,
    Seed,
    TargetName,
    Temperature,
    Tokenizer,
    check_output,
)


def generate(
    target: TargetName,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts; or give a file with --prompts.")] = None,
    drafter: Drafter = None,
    prompts: Prompts = None,
    field: Field = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="A longer prompt is an error.")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer that nothing stops before.")] = 256,
    temperature: Temperature = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the most probable tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Sample from this share of the mass only.")] = None,
    block_size: BlockSize = None,
    batch_size: RowsAtATime = 8,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Write the answers to this JSONL.")] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Decodes prompts: speculatively with a drafter, plainly without one."""
    from ..data import Conversation, encode, read_conversations
    from ..decode import decode
    from ..eval import table
    from ..models import stop_tokens

    if bool(prompt) == (prompts is not None):
        raise ValueError("generate needs prompts: as arguments, or a file with --prompts")
    conversations = (
        [Conversation.user(text) for text in prompt]
        if prompt
        else read_conversations(prompts, field=field, limit=limit)
    )
    check_output(output)
    model, tok = load_target(target, tokenizer, dtype, device)
    tapped, draft = load_pair(model, drafter)
    encoded = [encode(c, tok, max_prompt_tokens=max_prompt_tokens) for c in conversations]
    streaming = len(encoded) == 1
    written = output.open("w") if output else None

    answer: list[int] = []

    def stream(_index: int, tokens: list[int]) -> None:
        if not streaming:
            return
        # A token may be half a character, or lose its space when decoded alone: print what the whole gained.
        shown = tok.decode(answer, skip_special_tokens=True).rstrip("\ufffd")
        answer.extend(tokens)
        sys.stdout.write(tok.decode(answer, skip_special_tokens=True).rstrip("\ufffd")[len(shown) :])
        sys.stdout.flush()

    def finish(index: int, completion) -> None:
        text = tok.decode(completion.tokens, skip_special_tokens=True)
        if written:
            row = {"index": index, "text": text, "finish_reason": completion.finish_reason, "tau": completion.tau}
            written.write(json.dumps(row) + "\n")
            written.flush()
        elif not streaming:
            console.rule(f"prompt {index + 1}")
            console.print(text, markup=False, highlight=False)

    decoded = decode(
        tapped,
        draft,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=stop_tokens(tok, model),
        block_size=block_size,
        batch_size=batch_size,
        seed=seed,
        on_tokens=stream,
        on_finish=finish,
    )
    if streaming:
        print()
    errors.print(table({"all prompts": decoded}))  # what is piped is the answer alone
