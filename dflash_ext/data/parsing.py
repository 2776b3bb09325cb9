"""What the readers of this folder share: bytes as text, text as JSON, and a value in an error message."""

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
    """Raises DataError unless there is something to read at `path`: a file, a pipe, but no folder."""
    if path.is_dir():
        raise DataError(f"{path}: a file is expected, this is a folder")
    if not path.exists():
        raise DataError(f"{path}: no such file")


def decode(raw: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark; raises DataError with the line of the first byte that is not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        where += f": line {line + 1}" if line else ""
        raise DataError(f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None


def parse(text: str, where: str) -> Any:
    """The JSON value that `text` holds; raises DataError if it holds none that Python can represent."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{where}: not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply") from None
    except ValueError:  # Python reads no more than some thousand digits
        raise DataError(f"{where}: a number has too many digits") from None


def excerpt(value: Any) -> str:
    """Some of `value`, however large or deep, in one line."""
    text = _short.repr(value)
    return text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "..."
