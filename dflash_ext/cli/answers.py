"""`dflash-ext answers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import console_of_this_process
from .loading import load_target, to_answer
from .options import (
    AnswersAtATime,
    AnswerTemperatures,
    AtLeastTwoNewTokens,
    ChatTemplateArgs,
    Device,
    Dtype,
    Field,
    Limit,
    MaxPromptTokens,
    Seed,
    ServerModel,
    ServerUrl,
    TargetName,
    Tokenizer,
)
from .output import check_outputs


def answers(
    target: TargetName,
    prompts: Annotated[
        Path,
        typer.Option(metavar="<path>", help="A file of prompts or conversations, or plain text."),
    ],
    output: Annotated[
        Path, typer.Option(metavar="<path>", help="The file for the answers. One that was begun is continued.")
    ],
    field: Field = None,
    limit: Limit = None,
    max_prompt_tokens: MaxPromptTokens = 512,
    chat_template_args: ChatTemplateArgs = None,
    max_new_tokens: AtLeastTwoNewTokens = 256,
    temperature: AnswerTemperatures = None,
    decode_batch: AnswersAtATime = 32,
    server: ServerUrl = None,
    server_model: ServerModel = None,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Let a target answer prompts, for training with `train --answers`.

    Under torchrun the processes divide the prompts. Several of them may share a GPU.
    """
    import torch
    from accelerate import PartialState

    from ..data import LeftOut, answer_prompts, read_conversations
    from ..models import Target
    from ..progress import progress

    left_out = LeftOut()
    conversations = read_conversations(prompts, field=field, limit=limit, left_out=left_out)
    check_outputs({"--output": output})
    PartialState(cpu=True)  # processes that share a GPU must not find each other by NCCL
    model, tok = load_target(target, tokenizer, dtype, device, share_gpus=True)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    plain = Target(model)
    encoded, options = to_answer(
        plain,
        tok,
        conversations,
        prompts,
        left_out,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        chat_template_args=chat_template_args,
        temperature=temperature,
        server=server,
        server_model=server_model,
    )
    shown = console_of_this_process()
    with progress(shown, "the target answers", len(encoded) * len(options["temperatures"])) as advance:
        answer_prompts(plain, encoded, output, batch_size=decode_batch, seed=seed, on_progress=advance, **options)
    shown.print(f"the answers are in {output}")
