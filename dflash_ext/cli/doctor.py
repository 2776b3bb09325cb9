"""`dflash-ext doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import console
from .loading import encode_for, load_pair, load_target
from .options import AtLeastTwoNewTokens, ChatTemplateArgs, Device, Dtype, Field, Prompts, Tokenizer


def doctor(
    drafter: Annotated[
        Path | None,
        typer.Option(help="Examine this drafter (a folder or hub name); --target and --prompts go with it."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="The drafter's target, for which it was trained.")] = None,
    prompts: Prompts = None,
    field: Field = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only this many prompts, from the start of the file.")] = 8,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: AtLeastTwoNewTokens = 64,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Say what is built, and what serves each operator; or examine whether a drafter is read as it was trained."""
    from .. import doctor as installation

    if drafter is None:
        if target or prompts:
            raise ValueError("--target and --prompts examine a drafter: name it with --drafter")
        installation.report(console)
        return
    if target is None or prompts is None:
        raise ValueError("--drafter needs its --target and a file of --prompts")
    from .. import drafter_doctor
    from ..data import LeftOut, read_conversations
    from ..models import stop_tokens

    left_out = LeftOut()
    conversations = read_conversations(prompts, field=field, limit=limit, left_out=left_out)
    model, tok = load_target(target, tokenizer, dtype, device)
    tapped, draft = load_pair(model, drafter)

    def encoded(**changes) -> list[list[int]]:
        return list(
            encode_for(
                tapped,
                tok,
                conversations,
                prompts,
                left_out,
                max_prompt_tokens=1024,
                max_new_tokens=max_new_tokens,
                chat_template_args=(chat_template_args or {}) | changes,
            ).values()
        )

    asked = {"the prompts as they were given": encoded()}
    if "enable_thinking" in str(tok.chat_template or "") and "enable_thinking" not in (chat_template_args or {}):
        for thinking in (True, False):
            asked[f"a chat template with thinking {'on' if thinking else 'off'}"] = encoded(enable_thinking=thinking)
    with console.status("the target answers") as status:
        findings = drafter_doctor.examine(
            tapped,
            draft,
            tok,
            asked,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_tokens(tok, model),
            on_reading=lambda name, total: status.update(f"trying one of {total} readings: {name}"),
        )
    drafter_doctor.report(findings, console)
