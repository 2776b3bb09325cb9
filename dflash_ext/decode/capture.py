"""Captures of CUDA graphs, which leave the process as it was if they fail."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph,
    *,
    pool: tuple[int, int] | None,
    stream: torch.cuda.Stream | None = None,
    capture_error_mode: str = "global",
    waits: bool = True,
) -> Iterator[None]:
    """As `torch.cuda.graph`, whose arguments these are, of which two effects on others are taken away.

    Python's garbage collector is off within it: it might free another graph, which spoils a capture. And a capture that
    fails leaves the current stream, and PyTorch's random numbers, as they are within a capture. Both are set right.

    waits: whether it waits for the device, and returns cached memory, before. Otherwise the device goes on with what
    was queued, while the host makes the graph.
    """
    current, collects = torch.cuda.current_stream(), gc.isenabled()
    stream = stream or capture_stream(current.device)
    gc.disable()
    try:
        if waits:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode):
                yield
        else:
            with torch.cuda.stream(stream):
                graph.capture_begin(*([] if pool is None else [pool]), capture_error_mode=capture_error_mode)
                try:
                    yield
                finally:
                    graph.capture_end()
    except BaseException:
        torch.cuda.set_stream(current)
        # The end of a capture that succeeds ends that state of the random numbers.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=capture_error_mode):
            torch.zeros(1, device=current.device)
        raise
    finally:
        if collects:
            gc.enable()


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Calls twice what is to be captured, as the first calls of operators do more than later ones.

    Raises RuntimeError for an operator that waits for the device, which would spoil a capture, together with the
    process's CUDA state.
    """
    stream = warm_up_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, because cuBLAS keeps a workspace (32 MiB on Hopper) for every stream that has used it."""
    return torch.cuda.Stream(device)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, because graphs that share memory have to be captured in the same one."""
    return torch.cuda.Stream(device)
