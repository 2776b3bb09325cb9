"""The file of answers: a JSONL file with a header in the first line and one answer in every other line.

{"format": "dflash_ext.responses", "target": ..., "vocab_size": ..., "max_new_tokens": ..., "seed": ..., ...}
{"index": 17, "temperature": 0.0, "sample": 0, "conversation": 9, "prompt_ids": [...], "response_ids": [...]}

"sample" tells answers to one prompt at one temperature apart, and is 0 where it is missing. Prompts of one conversation
have the same number in "conversation", which is optional.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Container, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from ..models import Target
from .errors import DataError
from .parsing import excerpt, json_value, utf8_text

FORMAT = "dflash_ext.responses"
# What tells an answer from all others of a file: its prompt's index, the temperature, and which sample it is.
Key = tuple[int, float, int]
INSTEAD = "name another output, or remove this file"
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
    if header.get("weights") not in (None, target.fingerprint):
        raise DataError(f"{path}: the answers are of another target, {header.get('target')}: its weights differ")


def resume(path: Path, header: dict, wanted: Container[Key]) -> set[Key]:
    """Prepares the file at `path` for more answers: makes it if there is none, and drops a last line that was cut off.

    A file that holds no answer yet gets the new header. Answers in the files of other ranks are moved to it.

    Args:
        header: the settings of the answers. One that the file's header does not have is not compared.
        wanted: the answers that the run asks for.

    Returns:
        The answers in the file.

    Raises:
        DataError: `path` holds something else, answers under another header, or answers that the run does not ask for.
    """
    header = {"format": FORMAT, **header}
    first_line = _line(header)
    lines = whole_lines(path) if path.exists() else iter(())
    end, found = next(lines, (0, None))
    if found is None and path.exists() and not first_line.startswith(path.read_bytes()):
        raise DataError(f"{path}: exists and is not a file of answers")
    first_row = next(lines, None)
    if first_row is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(first_line)
        end = len(first_line)
    else:
        _check_header(path, found, header)
        lines = chain([first_row], lines)
    answered = set()
    for end_of_row, answer in lines:
        key = _key(answer)
        if key not in wanted:
            raise DataError(f"{path}: holds more answers at temperature {key[1]} than this run asks for; {INSTEAD}")
        answered.add(key)
        end = end_of_row
    os.truncate(path, end)
    for part in sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*")):
        _move(part, path, header, answered)
    return answered


def _move(part: Path, path: Path, header: dict, answered: set[Key]) -> None:
    """Appends the answers of a rank's file to the one at `path`, adds them to `answered`, and removes the rank's file.

    A kill between the two leaves answers in both files, which the next call finds in `answered`.
    """
    lines = whole_lines(part)
    _, found = next(lines, (0, header))
    _check_header(part, found, header)
    with path.open("ab") as file:
        for _, row in lines:
            if _key(row) not in answered:
                file.write(_line(row))
                answered.add(_key(row))
        file.flush()
        os.fsync(file.fileno())
    part.unlink()


def answered_in(path: Path) -> set[Key]:
    """The answers in the file at `path`, which `resume` has prepared."""
    return {_key(row) for _, row in islice(whole_lines(path), 1, None)}


def open_to_append(path: Path, header: dict, rank: int) -> BinaryIO:
    """The file to which a rank appends answers: that at `path` for rank 0, and for the others one beside it.

    `resume` moves the answers of the other ranks to the file at `path`.
    """
    if rank == 0:
        return path.open("ab")
    file = path.with_name(f"{path.name}.rank{rank}").open("wb")
    file.write(_line({"format": FORMAT, **header}))
    return file


def write_answer(file: BinaryIO, row: dict) -> None:
    """Appends an answer, which is on disk when this returns."""
    file.write(_line(row))
    file.flush()


def _line(value: dict) -> bytes:
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def _key(row: dict) -> Key:
    return row["index"], row["temperature"], row.get("sample", 0)


def _check_header(path: Path, found: dict, header: dict) -> None:
    for key, value in header.items():
        if found.get(key, value) != value:
            raise DataError(
                f"{path}: holds answers made with other {key.replace('_', ' ')} ({found[key]}, this run has {value}); "
                f"{INSTEAD}"
            )
