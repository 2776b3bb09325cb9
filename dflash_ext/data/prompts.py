"""Prompts from the files that people have: JSON rows of prompts or conversations, or plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .parsing import decode, excerpt, parse, require_file

KEYS = ("messages", "conversations", "turns", "prompt", "question", "instruction", "text")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
DOCUMENT_CHARS = 2000  # about 500 tokens of English
CONTINUED_TOKENS = 64  # the longest prompt cut from the start of a document


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """What the target is asked: `messages` up to a user's turn, or else plain `text` to be continued.

    Raises DataError for text that is no Unicode, which no tokenizer takes.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""

    def __post_init__(self):
        for text in (self.text, *(message.content for message in self.messages)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                lone = text[error.start]
                raise DataError(f"a lone surrogate, {lone!r}, which is half a character: {excerpt(text)}") from None

    @classmethod
    def user(cls, content: str) -> Conversation:
        return cls(messages=(Message("user", content),))


class PromptTooLong(DataError):
    """A prompt with more tokens than were allowed."""


def read_conversations(path: str | Path, *, field: str | None = None, limit: int | None = None) -> list[Conversation]:
    """Everything that the file at `path` asks, in its order; the first `limit` of it.

    A `.jsonl` file holds a JSON object in every line, a `.json` file an array of them; any other file is
    plain text, cut at blank lines (or at line ends or spaces where there is none) into documents of some
    2,000 characters. A row is recognised by the first of these keys that it has:

    - `messages` [{"role", "content"}] or `conversations` [{"from", "value"}]: every user turn is asked, after
      the history that the row gives; assistant turns before the first user turn are left out;
    - `turns` [str]: the first, because the later ones follow answers that the row does not have;
    - `prompt` or `question`: one user turn; answers beside it are ignored;
    - `instruction`, with an optional `input` below it: one user turn;
    - `text`: a document to be continued, without a chat template.

    `field` names another key to read instead. What it holds is taken for messages if it is a list of objects,
    for turns if it is a list of strings and for a user turn if it is a string.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or asks nothing, or a row is not of this form.
    """
    path = Path(path)
    require_file(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: at least one prompt is read")
    if path.suffix in (".jsonl", ".json"):
        rows = _json_lines(path) if path.suffix == ".jsonl" else _json_array(path)
        asked = _asked(rows, field)
    else:
        documents = _documents(decode(path.read_bytes(), str(path)))
        asked = (Conversation(text=document) for document in documents)
    conversations = list(islice(asked, limit))
    if not conversations:
        raise DataError(f"{path}: holds no prompt" if path.stat().st_size else f"{path}: the file is empty")
    return conversations


def encode(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    **template_options: Any,
) -> list[int]:
    """The token ids that the target continues.

    Messages go through the tokenizer's chat template, up to where the answer starts; `template_options` are
    passed to it (`enable_thinking=False` and the like). A tokenizer without one gets their contents,
    separated by blank lines. Of a document the prompt is the first half, but no more than 64 tokens, so
    that the target writes most of what is trained on.

    Raises:
        PromptTooLong: there are more than `max_prompt_tokens` of them.
        DataError: the chat template refuses the messages, or there is no token at all.
    """
    if conversation.text:
        ids = tokenizer(conversation.text)["input_ids"]
        ids = ids[: max(1, min(len(ids) // 2, CONTINUED_TOKENS, max_prompt_tokens))]
    elif tokenizer.chat_template:
        messages = [message._asdict() for message in conversation.messages]
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, **template_options
            )["input_ids"]
        except Exception as error:  # a template is a program: it may raise anything
            raise DataError(f"the chat template refuses {excerpt(messages)}: {error}") from None
    else:
        ids = tokenizer("\n\n".join(message.content for message in conversation.messages))["input_ids"]
    if not ids:
        raise DataError(f"no token in {excerpt(conversation.text or conversation.messages)}")
    if len(ids) > max_prompt_tokens:
        raise PromptTooLong(
            f"a prompt has {len(ids)} tokens, at most {max_prompt_tokens} are allowed: "
            f"{excerpt(conversation.text or conversation.messages[-1].content)}"
        )
    return ids


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if text := decode(line, where).strip():
                yield where, parse(text, where)


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    text = decode(path.read_bytes(), str(path)).strip()
    rows = parse(text, str(path)) if text else []
    if not isinstance(rows, list):
        raise DataError(f"{path}: an array of rows is expected; a file with one row a line is named .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _documents(text: str) -> Iterator[str]:
    """At most DOCUMENT_CHARS each, cut at the last blank line, line end or space of their second half."""
    text = re.sub(r"\n\s*\n", "\n\n", text.replace("\r\n", "\n"))
    start = 0
    while start < len(text):
        end = start + DOCUMENT_CHARS
        if end < len(text):
            cuts = (text.rfind(gap, start + DOCUMENT_CHARS // 2, end) for gap in ("\n\n", "\n", " "))
            end = next((cut for cut in cuts if cut != -1), end)
        if document := text[start:end].strip():
            yield document
        start = end


def _asked(rows: Iterator[tuple[str, Any]], field: str | None) -> Iterator[Conversation]:
    for where, row in rows:
        try:
            yield from _conversations(row, field)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _conversations(row: Any, field: str | None) -> Iterator[Conversation]:
    if not isinstance(row, dict):
        raise DataError(f"a JSON object is expected, this is {excerpt(row)}")
    key = field or next((key for key in KEYS if key in row), None)
    if key not in row:
        wanted = f"the key '{field}'" if field else f"any of the keys {', '.join(KEYS)}"
        raise DataError(f"{wanted} is expected; the row has {excerpt(list(row))}")
    asked = row[key]
    if isinstance(asked, list) and asked and all(isinstance(turn, str) for turn in asked):
        asked = asked[0]
    if isinstance(asked, list):
        yield from _user_turns(asked, key)
    elif not isinstance(asked, str):
        raise DataError(f"'{key}' is neither text nor a list of turns: {excerpt(asked)}")
    elif not asked.strip():
        raise DataError(f"'{key}' is empty")
    elif key == "text":
        yield Conversation(text=asked)
    elif key == "instruction" and row.get("input"):
        if not isinstance(row["input"], str):
            raise DataError(f"'input' is not text: {excerpt(row['input'])}")
        yield Conversation.user(f"{asked}\n\n{row['input']}")
    else:
        yield Conversation.user(asked)


def _user_turns(turns: list, key: str) -> Iterator[Conversation]:
    history: list[Message] = []
    for turn in turns:
        message = _message(turn, key)
        if message.role == "assistant" and all(earlier.role == "system" for earlier in history):
            continue
        history.append(message)
        if message.role == "user" and message.content.strip():
            yield Conversation(messages=tuple(history))


def _message(turn: Any, key: str) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return Message(ROLES[role], content)
    raise DataError(f"'{key}' has the turn {excerpt(turn)}, not a role ({', '.join(ROLES)}) with text as its content")
