"""The file of answers: a JSONL file with a header in the first line and one answer in every other line.

{"format": "dflash_ext.responses", "target": ..., "vocab_size": ..., "max_new_tokens": ..., ...}
{"index": 17, "temperature": 0.0, "sample": 0, "conversation": 9, "prompt_ids": [...], "response_ids": [...]}

"sample" tells answers to one prompt at one temperature apart, and is 0 where it is missing. Prompts of one conversation
have the same number in "conversation", which is optional.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..models import Target
from . import fingerprints
from .errors import DataError
from .parsing import excerpt, json_value, utf8_text

FORMAT = "dflash_ext.responses"
ROW_KEYS = {"index", "temperature", "prompt_ids", "response_ids"}


def whole_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields the header and the rows, each with the offset of its end. A last line that was cut off is skipped.

    Raises:
        DataError: the first line is no header, or a later line is no row of tokens in the header's vocabulary.
    """
    end = vocab_size = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            where = f"{path}:{number}"
            row = json_value(utf8_text(line, where).rstrip("\n"), where)
            if number > 1:
                if wrong := _what_is_wrong(row, vocab_size):
                    raise DataError(f"{where}: {wrong}")
            elif not isinstance(row, dict) or row.get("format") != FORMAT or type(row.get("vocab_size")) is not int:
                raise DataError(f"{path}: not a file of answers, its first line is no {FORMAT} header")
            else:
                vocab_size = row["vocab_size"]
            yield end, row


def _what_is_wrong(row: Any, vocab_size: int) -> str | None:
    if not (isinstance(row, dict) and ROW_KEYS <= row.keys()):
        return f"a row with {', '.join(sorted(ROW_KEYS))} is expected, this is {excerpt(row)}"
    if type(row["index"]) is not int or type(row["temperature"]) not in (int, float):
        return f"index {excerpt(row['index'])} and temperature {excerpt(row['temperature'])} should be numbers"
    for key in ("prompt_ids", "response_ids"):
        ids = row[key]
        if not isinstance(ids, list):
            return f"'{key}' is not a list of tokens: {excerpt(ids)}"
        if strange := [token for token in ids if type(token) is not int or not 0 <= token < vocab_size]:
            return f"'{key}' has {excerpt(strange[0])}, which is no token of a vocabulary of {vocab_size}"
    return None


def check_target(path: Path, header: dict, target: Target) -> None:
    """Raises DataError if the answers under `header` are of another target. A file may come without a fingerprint."""
    if header["vocab_size"] != target.vocab_size:
        raise DataError(
            f"{path}: the answers are of a target with a vocabulary of {header['vocab_size']}; "
            f"this one has {target.vocab_size}"
        )
    if header.get("weights") not in (None, fingerprints.of_weights(target.model)):
        raise DataError(f"{path}: the answers are of another target, {header.get('target')}: its weights differ")


def resume(path: Path, header: dict) -> set[tuple[int, float, int]]:
    """Prepares the file at `path` for more answers: makes it if there is none, and drops a last line that was cut off.

    A file that holds no answer yet gets the new header.

    Returns:
        The answers in the file: the index of the prompt, the temperature, and which of the answers to this prompt at
        this temperature it is, from 0.

    Raises:
        DataError: `path` holds something else, or answers under another header.
    """
    header = {"format": FORMAT, **header}
    first_line = (json.dumps(header) + "\n").encode()
    lines = whole_lines(path) if path.exists() else iter(())
    _, found = next(lines, (0, None))
    if found is None and path.exists() and not first_line.startswith(path.read_bytes()):
        raise DataError(f"{path}: exists and is not a file of answers")
    first_row = next(lines, None)
    if first_row is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(first_line)
        return set()
    for key, value in header.items():
        if found.get(key) != value:
            raise DataError(
                f"{path}: holds answers made with other {key.replace('_', ' ')} ({found.get(key)}, "
                f"this run has {value}); choose another output folder, or remove this file"
            )
    answered = set()
    end = 0
    for row_end, answer in chain([first_row], lines):
        answered.add(sample_key(answer))
        end = row_end
    os.truncate(path, end)
    return answered


def sample_key(row: dict) -> tuple[int, float, int]:
    """What tells the answer in a row from all others of the file."""
    return row["index"], row["temperature"], row.get("sample", 0)
