"""Reads the outputs of modules during one call. A call sees only its own outputs, not those of other threads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# The owner of the taps that are read in this thread (or task), and the dict for their outputs.
_reader: ContextVar[tuple[object, dict[int, Tensor]] | None] = ContextVar("dflash_ext_taps", default=None)


class Taps:
    """Hooks on some modules of a model. They are active only while `reading`, and are removed with this object.

    Args:
        modules: the module whose output is each tap. If it returns a tuple (or a ModelOutput), its first entry is used.
    """

    def __init__(self, modules: Mapping[int, nn.Module]):
        self._owner = object()
        handles = [module.register_forward_hook(_hook(self._owner, tap)) for tap, module in modules.items()]
        weakref.finalize(self, _remove, handles)

    @contextmanager
    def reading(self) -> Iterator[dict[int, Tensor]]:
        """Yields a dict that holds every tap's output after a forward in this context."""
        outputs: dict[int, Tensor] = {}
        token = _reader.set((self._owner, outputs))
        try:
            yield outputs
        finally:
            _reader.reset(token)


def _hook(owner: object, tap: int) -> Callable[[nn.Module, tuple, object], None]:
    def keep(_module: nn.Module, _inputs: tuple, output: object) -> None:
        reader = _reader.get()
        if reader is not None and reader[0] is owner:
            reader[1][tap] = output if isinstance(output, Tensor) else output[0]

    return keep


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
