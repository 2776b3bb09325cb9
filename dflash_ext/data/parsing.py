"""Shared by the readers of this folder: bytes to text, text to JSON, and excerpts of values for error messages."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from .errors import DataError

EXCERPT = 80

_short = reprlib.Repr()
_short.maxstring = _short.maxother = EXCERPT


def require_file(path: Path) -> None:
    """Raises DataError unless `path` is a file or a pipe."""
    if path.is_dir():
        raise DataError(f"{path}: a file is expected, this is a folder")
    if not path.exists():
        raise DataError(f"{path}: no such file")


def utf8_text(raw: bytes, where: str) -> str:
    """The text of UTF-8 bytes, with or without a byte order mark.

    Raises DataError, which names the line, for a byte that is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        where += f": line {line + 1}" if line else ""
        raise DataError(f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None


def json_value(text: str, where: str) -> Any:
    """The value that `text` holds as JSON; raises DataError if it is not valid JSON or Python cannot hold it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # brackets nested too deeply, an integer of too many digits
        raise DataError(f"{where}: JSON that cannot be read: {error}") from None


def excerpt(value: Any) -> str:
    """The start of `value` as Python writes it, in one line of at most EXCERPT characters."""
    text = _short.repr(value)
    return text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "..."
