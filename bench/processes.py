"""Calls that each live in a process of their own and take turns on the GPU.

They compile at the same time, and the memory of one is not counted for another.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from bench.timing import Timing


class Timed(Protocol):
    def time(self) -> float:
        """The milliseconds of one call."""


class Remote:
    """An object that lives in a new process, where ``make(*arguments)`` makes it."""

    def __init__(self, make: Callable[..., Timed], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the object and returns its result. Raises EOFError if the process has ended."""
        self._connection.send((method, arguments))
        return self._connection.recv()

    def end(self) -> None:
        """Ends the process, so that the others have its memory."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, make: Callable[..., Timed], arguments: tuple) -> None:
    served = make(*arguments)
    torch.cuda.empty_cache()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # nothing more is asked
            return
        result = getattr(served, method)(*arguments)
        torch.cuda.empty_cache()  # the other processes need the memory
        connection.send(result)


def process_turns(remotes: dict[str, Remote], *, rounds: int = 15) -> dict[str, Timing]:
    """Times each object's call once in every round."""
    for remote in remotes.values():
        for _ in range(3):
            remote.ask("time")
    samples = {name: [] for name in remotes}
    for _ in range(rounds):
        for name, remote in remotes.items():
            samples[name].append(remote.ask("time"))
    return {name: Timing.of(each) for name, each in samples.items()}
