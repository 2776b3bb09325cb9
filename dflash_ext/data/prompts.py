"""Reads prompts from files: rows of prompts or conversations in JSON, or plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError
from .left_out import LeftOut
from .parsing import excerpt, json_value, require_file, utf8_text

KEYS = ("messages", "conversations", "turns", "prompt", "question", "instruction", "text")
# The names of speakers in OpenAI's and Gemini's chats and in ShareGPT, in lower case, each with the role that chat
# templates know. A "developer" message is what later OpenAI models call a system message.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
TEXT_PARTS = ("text", "input_text", "output_text")
DOCUMENT_CHARS = 2000  # about 500 tokens of English


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A prompt before it is encoded: `messages` up to a turn of the user, or plain `text` that the target continues.

    `row` is the number of the row that it was read from, from 0: prompts of one row are turns of one conversation.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    row: int | None = field(default=None, compare=False)

    @classmethod
    def user(cls, content: str) -> Conversation:
        return cls(messages=(Message("user", content),))


def read_conversations(
    path: str | Path, *, field: str | None = None, limit: int | None = None, left_out: LeftOut | None = None
) -> list[Conversation]:
    """The prompts of the file at `path`, in the file's order, at most `limit` of them.

    A `.jsonl` or `.ndjson` file holds a JSON object in every line, a `.json` file an array of objects. Any other file
    is plain text. It is cut at blank lines (or else at line ends or spaces) into documents of about 2,000 characters.
    In each object, the first of these keys that is not empty is read:

    - `messages` [{"role", "content" or "parts"}] or `conversations` [{"from", "value"}]: every user turn is a prompt,
      together with the turns before it. Assistant turns before the first user turn are left out.
    - `turns` [str]: the first turn, because the later ones follow answers that the row does not have.
    - `prompt` or `question`: one user turn. Answers beside it are ignored.
    - `instruction`, with an optional `input` below it: one user turn.
    - `text`: a document that the target continues, without a chat template.

    The content of a turn is text, or a list of parts whose texts are joined with line ends.

    Args:
        field: another key to read instead. A list of objects is read as messages, a list of strings as turns, and a
            string as a user turn.
        left_out: counts what is read but cannot be used: turns without text (such as calls of tools), turns of other
            roles than user, assistant and system (such as the results of tools), parts that are not text, empty rows,
            and conversations in which no user speaks.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or has no prompt, or a row is not of this form.
    """
    path = Path(path)
    require_file(path)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: at least one prompt is read")
    left_out = LeftOut() if left_out is None else left_out
    if reader := READERS.get(path.suffix.lower()):
        rows = reader(path)
        asked = _from_rows(rows, field, left_out)
    else:
        documents = _documents(utf8_text(path.read_bytes(), str(path)))
        asked = (Conversation(text=document) for document in documents)
    conversations = list(islice(asked, limit))
    if not conversations:
        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty")
        raise DataError(f"{path}: holds no prompt" + (f", but {left_out}" if left_out else ""))
    return conversations


def read_references(path: str | Path, key: str) -> list[str]:
    """The right answers that the rows of a JSON file have under `key`: one for each row, as `Conversation.row` counts.

    Raises:
        DataError: the file is no JSON file, or a row has no text there.
    """
    path = Path(path)
    require_file(path)
    if (reader := READERS.get(path.suffix.lower())) is None:
        raise DataError(f"{path}: only rows of JSON have right answers")
    found = []
    for where, row in reader(path):
        text = row.get(key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where}: the right answer, a text under '{key}', is expected: {excerpt(row)}")
        found.append(text)
    return found


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if text := utf8_text(line, where).strip():
                yield where, json_value(text, where)


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    text = utf8_text(path.read_bytes(), str(path)).strip()
    rows = json_value(text, str(path)) if text else []
    if not isinstance(rows, list):
        raise DataError(f"{path}: an array of rows is expected; a file with one row a line is named .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_array}


def _documents(text: str) -> Iterator[str]:
    """Cuts the text into documents of at most DOCUMENT_CHARS characters.

    A document ends at the last blank line of its second half, or else at the last line end, or else at the last space.
    """
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


def _from_rows(rows: Iterator[tuple[str, Any]], field: str | None, left_out: LeftOut) -> Iterator[Conversation]:
    for number, (where, row) in enumerate(rows):
        try:
            for conversation in _conversations(row, field, left_out):
                yield replace(conversation, row=number)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _conversations(row: Any, field: str | None, left_out: LeftOut) -> Iterator[Conversation]:
    if not isinstance(row, dict):
        raise DataError(f"a JSON object is expected, this is {excerpt(row)}")
    present = [key for key in ([field] if field else KEYS) if key in row]
    if not present:
        wanted = f"the key '{field}'" if field else f"any of the keys {', '.join(KEYS)}"
        raise DataError(f"{wanted} is expected; the row has {excerpt(list(row))}")
    key = next((key for key in present if row[key]), present[0])
    asked = row[key]
    if isinstance(asked, list) and asked and all(isinstance(turn, str) for turn in asked):
        asked = asked[0]
    if not asked or isinstance(asked, str) and not asked.strip():
        left_out[f"rows in which '{key}' is empty"] += 1
    elif isinstance(asked, list):
        yield from _user_turns(asked, left_out)
    elif not isinstance(asked, str):
        raise DataError(f"'{key}' is neither text nor a list of turns: {excerpt(asked)}")
    elif key == "text":
        yield Conversation(text=asked)
    elif key == "instruction" and row.get("input"):
        if not isinstance(row["input"], str):
            raise DataError(f"'input' is not text: {excerpt(row['input'])}")
        yield Conversation.user(f"{asked}\n\n{row['input']}")
    else:
        yield Conversation.user(asked)


def _user_turns(turns: list, left_out: LeftOut) -> Iterator[Conversation]:
    history: list[Message] = []
    for turn in turns:
        message = _message(turn, left_out)
        if message is None or message.role == "assistant" and all(earlier.role == "system" for earlier in history):
            continue
        history.append(message)
        if message.role == "user":
            yield Conversation(messages=tuple(history))
    if not any(message.role == "user" for message in history):
        left_out["conversations in which no user speaks"] += 1


def _message(turn: Any, left_out: LeftOut) -> Message | None:
    if not isinstance(turn, dict):
        left_out["turns that are no JSON objects"] += 1
        return None
    speaker = _first_set(turn, "role", "from")
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        left_out[f"turns of role {excerpt(speaker)}"] += 1
        return None
    content = _content(_first_set(turn, "content", "value", "parts"), left_out)
    if not content.strip():
        left_out["turns without text"] += 1
        return None
    return Message(role, content)


def _first_set(turn: dict, *keys: str) -> Any:
    """The first value that is not null: tables of rows with different keys fill the missing ones with null."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _content(content: Any, left_out: LeftOut) -> str:
    """The text of a turn: the content itself, or the texts of its parts, joined with line ends."""
    if isinstance(content, str):
        return content
    texts = []
    for part in [content] if isinstance(content, dict) else content if isinstance(content, list) else []:
        kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
        if kind in TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        else:
            left_out[f"parts of type {excerpt(kind)}"] += 1
    return "\n".join(texts)
