"""Loads the models and encodes the prompts that the options name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .app import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data import Conversation, LeftOut
    from ..models import Denoiser, DFlashDrafter, LoraDrafter, Target


def load_target(
    name: str,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
    *,
    or_canvas_model: bool = False,
    share_gpus: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target and its tokenizer. Under torchrun, every process uses a GPU of its own.

    or_canvas_model: a DiffusionGemma will do, too.
    share_gpus: there may be more processes than GPUs.
    """
    import torch

    from .. import models

    local_rank = os.environ.get("LOCAL_RANK")  # torchrun sets it
    if local_rank and device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{int(local_rank) % torch.cuda.device_count() if share_gpus else local_rank}"
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"dtype '{dtype}' is not supported; choose one of {', '.join(kinds)}")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device '{device}' is not supported; choose cpu or cuda")
    where = torch.device(device) if device else None
    if where is not None and where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"there is no CUDA device for --device {device} ({found} found); the default needs none")
    options = {"dtype": kinds.get(dtype), "device": where, "or_canvas_model": or_canvas_model}
    return models.load_target(name, tokenizer=tokenizer, **options)


def load_canvas_model(
    name: str, denoiser: Path | None, tokenizer: str | None, dtype: str | None, device: str | None
) -> tuple[Denoiser | PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """What `decode_canvas` takes, the model in it, and its tokenizer."""
    from .. import models

    model, tok = load_target(name, tokenizer, dtype, device, or_canvas_model=True)
    if models.is_diffusion_gemma(model):
        if denoiser is not None:
            raise ValueError(f"'{name}' is a DiffusionGemma, which needs no --denoiser")
        return model, model, tok
    if denoiser is None:
        raise ValueError(f"'{name}' is a causal LM: name a denoiser that was trained for it with --denoiser")
    return models.load_denoiser(model, denoiser), model, tok


def load_pair(
    model: PreTrainedModel, path: Path | None, base: PreTrainedModel | None = None
) -> tuple[Target, DFlashDrafter | LoraDrafter | None]:
    """The target and the drafter at `path`; the target is tapped for it. Without a path, the target alone, and None.

    base: as in `models.load_pair`.
    """
    from .. import models

    return (models.Target(model), None) if path is None else models.load_pair(model, path, base)


def load_drafter_base(
    name: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The base that `--drafter-base` names, in the dtype and on the device of `model`, which verifies.

    Raises ValueError if its tokens are not those of `tokenizer`.
    """
    if name is None:
        return None
    from .. import models

    base, own = models.load_target(name, dtype=model.dtype, device=model.device)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--drafter-base {name}: its tokenizer has other tokens than the target's")
    return base


def load_drafter(path: Path | None, model: PreTrainedModel) -> DFlashDrafter | None:
    """The DFlash drafter at `path` in the model's dtype and on its device; None without a path."""
    from .. import models

    return path and models.load_drafter(path, dtype=model.dtype, device=model.device)


def asked(
    command: str,
    texts: list[str] | None,
    file: Path | None,
    field: str | None,
    limit: int | None,
    left_out: LeftOut,
) -> list[Conversation]:
    """The prompts of a command that takes them as arguments or in a file, but not both."""
    from ..data import Conversation, read_conversations

    if texts and file is not None:
        raise ValueError(
            f"{command} takes prompts either as arguments or in the file of --prompts: leave one of them out"
        )
    if not texts and file is None:
        raise ValueError(f"{command} needs prompts, either as arguments or in a file that --prompts names")
    if texts:
        return [Conversation.user(text) for text in texts]
    return read_conversations(file, field=field, limit=limit, left_out=left_out)


def encode_for(
    target: Target | None,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    source: str | Path,
    left_out: LeftOut,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    chat_template_args: Mapping[str, Any] | None,
) -> dict[int, list[int]]:
    """The token ids of the conversations by their index.

    Prompts that are too long for the option, or for the target if there is one, are left out. One line on standard
    error says what was left out of `source`, and another names a variable that the chat template does not have.
    """
    from ..data import encode_all, unused_template_args

    for name in unused_template_args(tokenizer, chat_template_args or {}):
        say(f"dflash-ext: the tokenizer's chat template has no variable '{name}', so it changes nothing")
    if target is not None and target.max_tokens is not None and target.max_tokens > max_new_tokens:
        max_prompt_tokens = min(max_prompt_tokens, target.max_tokens - max_new_tokens)
    prompts = encode_all(
        conversations,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        chat_template_args=chat_template_args,
        left_out=left_out,
    )
    if left_out and not int(os.environ.get("RANK", 0)):
        say(f"dflash-ext: left out of {source}: {left_out}")
    return prompts


def to_answer(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    source: str | Path,
    left_out: LeftOut,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    chat_template_args: Mapping[str, Any] | None,
    temperature: list[float] | None,
    server: str | None,
    server_model: str | None,
) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """The encoded conversations (`encode_for`), and how the target or a server answers them.

    The latter are the arguments that `answer_prompts` and `train_on_prompts` have in common.
    """
    from ..data import Server, conversation_numbers
    from ..models import stop_tokens

    shared = dict(max_new_tokens=max_new_tokens, chat_template_args=chat_template_args)
    prompts = encode_for(
        target, tokenizer, conversations, source, left_out, max_prompt_tokens=max_prompt_tokens, **shared
    )
    return prompts, shared | dict(
        temperatures=tuple(temperature or (0.0,)),
        stop_token_ids=stop_tokens(tokenizer, target.model),
        conversations=conversation_numbers(conversations),
        server=server and Server(server, tokenizer, model=server_model),
    )


def mask_token_id(tokenizer: PreTrainedTokenizerBase, given: str | None, new: int | None = None) -> int:
    """The id of the mask token, which is given by its text or id; None stands for the tokenizer's own.

    If the tokenizer has none, it is `new`, the id of a new token, or without it a ValueError is raised.
    """
    if given is None:
        if tokenizer.mask_token_id is None and new is not None:
            return new
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token: name a spare one, by text or id, with --mask-token")
        return tokenizer.mask_token_id
    if given.isascii() and given.isdigit():
        return int(given)
    token = tokenizer.convert_tokens_to_ids(given)
    if token is None or token == tokenizer.unk_token_id:
        raise ValueError(f"mask token '{given}' is not in the tokenizer's vocabulary")
    return token
