"""Writes the files of a command: an old file is replaced only when the new one is complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .app import say


def check_outputs(outputs: Mapping[str, Path | None], read: Iterable[Path | None] = ()) -> None:
    """Raises ValueError unless every output can be a file, and replaces neither another output nor a file that is read.

    outputs: the files by the options that name them. None means that no file is wanted.
    """
    taken = {path.resolve() for path in read if path}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"{option} {path}: a file in a folder that exists is expected")
        if path.resolve() in taken and (path.is_file() or not path.exists()):  # pipes and devices may serve twice
            raise ValueError(f"{option} {path}: this command reads or writes that file already")
        taken.add(path.resolve())


def check_folder(path: Path, model: str | None = None) -> None:
    """Raises ValueError if `path`, which --output names, cannot be a folder, or is the one that `model` is read from.

    What a training saves takes the place of a model's weights.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {path}: a folder is expected, this is a file")
    if model is not None and path.exists() and Path(model).exists() and path.samefile(model):
        raise ValueError(f"--output {path}: the model is read from this folder, name another one")


def write_text(_index: int, text: str) -> None:
    """Shows a piece of the one answer of a command as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Opens a new file that replaces the one at `path` when the block ends.

    If the block raises, `path` stays as it was. What was written until then stays beside it in a file whose name ends
    in `.part`, and a line on standard error names that file. A pipe or a device at `path` is written to directly.
    """
    if path.exists() and not path.is_file():  # asked before links are followed: that of a pipe leads to no path
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = path.resolve()
    part = path.with_name(path.name + ".part")
    file = part.open("w", encoding="utf-8")
    try:
        with file:
            yield file
        os.replace(part, path)
    except BaseException:
        if part.stat().st_size:
            say(f"dflash-ext: what was written so far is in {part}")
        else:
            part.unlink()
        raise
