"""Progress with the time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    def __call__(self, count: int, note: str = "") -> None:
        """Reports that `count` more are done; `note` is shown behind the figures until the next call."""


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Advance]:
    """Yields the function that says how many more of `total` are done."""
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
