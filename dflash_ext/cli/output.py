"""Files that a command writes: an old one is replaced only when the new one is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .app import say


def check_output(path: Path | None) -> None:
    """Raises ValueError unless a file can be at `path`; None is no file."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"--output {path}: a file in a folder that exists is expected")


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Opens a new file that takes the place of the one at `path` when the block ends.

    If the block raises, `path` is left as it was; what was written until then stays in a file beside it, whose name
    ends in `.part`, and is named on standard error. A pipe or a device at `path` is written to directly.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        if part.stat().st_size:
            say(f"dflash-ext: what was written so far is in {part}")
        else:
            part.unlink()
        raise
