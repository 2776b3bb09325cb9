"""Encodes conversations as the token ids that the target continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from .errors import PromptError, PromptTooLong
from .left_out import LeftOut
from .parsing import excerpt
from .prompts import Conversation

CONTINUED_TOKENS = 64  # the longest prompt cut from the start of a document


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    chat_template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids that the target continues.

    Messages go through the tokenizer's chat template, up to where the answer starts. If the tokenizer has no chat
    template, their contents are joined with blank lines. The prompt of a document is its first half, at most 64 tokens,
    so that the target writes most of what is trained on.

    Args:
        max_prompt_tokens: the largest number of tokens in a prompt.
        chat_template_args: variables for the chat template, such as `{"enable_thinking": False}`. A template ignores
            variables that it does not have (`unused_template_args`).

    Raises:
        PromptTooLong: the prompt has more than `max_prompt_tokens` tokens.
        PromptError: the tokenizer or its chat template refuses the text, or the text has no token.
    """
    shown = excerpt(conversation.text or conversation.messages[-1].content)
    try:
        if conversation.text:
            ids = tokenizer(conversation.text)["input_ids"]
            ids = ids[: max(1, min(len(ids) // 2, CONTINUED_TOKENS, max_prompt_tokens))]
        elif tokenizer.chat_template:
            messages = [message._asdict() for message in conversation.messages]
            options = {"add_generation_prompt": True, "return_dict": True} | dict(chat_template_args or {})
            ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        else:
            ids = tokenizer("\n\n".join(message.content for message in conversation.messages))["input_ids"]
    except Exception as error:  # a chat template is a program and may raise anything
        refuses = "the chat template" if tokenizer.chat_template and conversation.messages else "the tokenizer"
        reason = " ".join(str(error).split())
        raise PromptError(f"{refuses} refuses {shown}: {reason}", f"prompts that {refuses} refuses: {reason}") from None
    if not ids:
        raise PromptError(f"a prompt has no token: {shown}", "prompts without a token")
    if len(ids) > max_prompt_tokens:
        raise PromptTooLong(
            f"a prompt has {len(ids)} tokens, at most {max_prompt_tokens} are allowed: {shown}",
            f"prompts of more than {max_prompt_tokens} tokens",
        )
    return ids


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    chat_template_args: Mapping[str, Any] | None = None,
    left_out: LeftOut | None = None,
) -> dict[int, list[int]]:
    """The token ids of every conversation that can be encoded, by its index in `conversations`.

    The processes of a distributed run each encode a part, and all of them get all.

    Args:
        max_prompt_tokens, chat_template_args: as for `encode`.
        left_out: counts the conversations that are too long or that the tokenizer or its chat template refuses.

    Raises:
        PromptError: no conversation can be encoded. The error is that of the first one.
    """
    left_out = LeftOut() if left_out is None else left_out
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    made: dict[int, list[int] | PromptError] = {}
    for index in range(rank, len(conversations), ranks):
        try:
            made[index] = encode(
                conversations[index],
                tokenizer,
                max_prompt_tokens=max_prompt_tokens,
                chat_template_args=chat_template_args,
            )
        except PromptError as error:
            made[index] = error
    parts = [made]
    if ranks > 1:
        parts = [{}] * ranks
        dist.all_gather_object(parts, made)
    encoded = [parts[index % ranks][index] for index in range(len(conversations))]
    prompts = {index: ids for index, ids in enumerate(encoded) if not isinstance(ids, PromptError)}
    errors = [error for error in encoded if isinstance(error, PromptError)]
    left_out.update(error.kind for error in errors)
    if errors and not prompts:
        raise errors[0]
    return prompts


def unused_template_args(tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any]) -> list[str]:
    """The names in `args` that the tokenizer's chat template does not have: a template ignores them."""
    template = str(tokenizer.chat_template or "")
    return [name for name in args if name not in template]
