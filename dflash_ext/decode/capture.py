"""Captures of CUDA graphs, which leave the process as it was if they fail."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph,
    *,
    pool: tuple[int, int] | None,
    stream: torch.cuda.Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """As `torch.cuda.graph`, whose arguments these are, of which two effects on others are taken away.

    Python's garbage collector is off within it: it might free another graph, which spoils a capture. And a capture that
    fails leaves the current stream, and PyTorch's random numbers, as they are within a capture. Both are set right.
    """
    current, collects = torch.cuda.current_stream(), gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode):
            yield
    except BaseException:
        torch.cuda.set_stream(current)
        # The end of a capture that succeeds ends that state of the random numbers.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=capture_error_mode):
            torch.zeros(1, device=current.device)
        raise
    finally:
        if collects:
            gc.enable()


@functools.cache
def warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, because cuBLAS keeps a workspace (32 MiB on Hopper) for every stream that has used it."""
    return torch.cuda.Stream(device)
