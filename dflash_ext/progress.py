"""Progress with the time left: a bar on a terminal, a line every ten seconds elsewhere.

Bars of other libraries can be hidden.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tqdm import tqdm


class Advance(Protocol):
    def __call__(self, count: int, note: str = "") -> None:
        """Reports that `count` more are done; `note` is shown behind the figures until the next call."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, which is in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Advance]:
    """Shows how much of `total` is done. Yields the function that reports progress."""
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    figures = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    with Progress(TextColumn("{task.description}"), *figures, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda count, note="": bar.update(task, advance=count, note=note)


def _lines(console: Console, what: str, total: int, every: float = 10.0) -> Advance:
    began = last = time.monotonic()
    done = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= every and done:
            last = now
            left = (now - began) * (total - done) / done
            figures = f"{what}: {done} of {total}, {left:.0f} s left"
            console.print(f"{figures}, {note}" if note else figures, highlight=False)

    return advance


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Hides the bars of tqdm that transformers shows while it reads, converts or writes weights.

    Downloads from the hub keep their bars, because huggingface_hub decides for each bar whether it is shown.
    transformers' own switch would hide these, too, and would not hide the bar of a GGUF's conversion.
    """
    original = tqdm.__init__

    def hidden_by_default(bar: tqdm, *args, **options) -> None:
        original(bar, *args, **{"disable": True} | options)

    tqdm.__init__ = hidden_by_default
    try:
        yield
    finally:
        tqdm.__init__ = original
