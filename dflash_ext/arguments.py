"""Public functions refuse in one line what is not of the kind that their annotations name, or lies elsewhere."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Number, Real
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist = 2, 4


class _Kind(NamedTuple):
    types: tuple[type, ...]
    words: str
    items: tuple[type, ...] = ()  # what the sequences among them hold


_KINDS = {
    Tensor: _Kind((Tensor,), "a tensor"),
    int: _Kind((int, torch.SymInt, Integral), "an int"),
    float: _Kind((float, int, torch.SymFloat, torch.SymInt, Real), "a number"),
    bool: _Kind((bool, np.bool_, torch.SymBool), "a bool"),
    str: _Kind((str,), "a string"),
    torch.dtype: _Kind((torch.dtype,), "a torch.dtype"),
    NoneType: _Kind((NoneType,), "None"),
}
_INT = _KINDS[int]  # by its own name, as torch.compile cannot look into the dict once it has generic aliases
_KINDS[Sequence[int]] = _Kind((Sequence,), "a sequence of ints", _INT.types)
_KINDS[Sequence[Tensor]] = _Kind((Sequence,), "a sequence of tensors", (Tensor,))


def checked(function: Callable) -> Callable:
    """The function, which now raises TypeError, naming the argument, for one of another kind than its annotation.

    Tensors, numbers, bools, strings, dtypes and sequences are told apart. Arguments whose annotation names anything
    else are left to the function.
    """
    where = function.__qualname__
    # A class is not there yet while its methods are being made.
    hints = get_type_hints(function, localns={where.split(".")[0]: object})
    kinds = {name: _kind(hints.get(name)) for name in inspect.signature(function).parameters}

    @functools.wraps(function)
    def call(*args, **kwargs):
        for name, value in (*zip(kinds, args, strict=False), *kwargs.items()):
            kind = kinds.get(name)
            # Most values are of the very type, which takes a tenth of the time to see.
            if kind is not None and type(value) not in kind.types and not _is(value, kind):
                raise TypeError(f"{where}: {name} is {shown(value)}; {kind.words} is needed")
        return function(*args, **kwargs)

    # Code of its own: torch.compile keeps and counts its graphs by code, which all functions would share.
    call.__code__ = call.__code__.replace(co_name=where)
    return call


def _kind(hint: Any) -> _Kind | None:
    """The kinds of a union as one; None if one of them is not checked."""
    kinds = [_KINDS.get(each) for each in ((hint,) if hint in _KINDS else get_args(hint) or (hint,))]
    if None in kinds:
        return None
    types, words, items = zip(*kinds, strict=True)
    listed = " or ".join(words).replace(" or ", ", ", max(len(words) - 2, 0))
    return _Kind(sum(types, ()), listed, sum(items, ()))


def _is(value: Any, kind: _Kind) -> bool:
    if isinstance(value, bool):
        return bool in kind.types
    if isinstance(value, kind.types):
        return not kind.items or isinstance(value, Tensor) or all(isinstance(item, kind.items) for item in value)
    # A tensor without dimensions is a number: torch.jit.trace makes such ones of shapes. As numbers have no gradients,
    # one that wants its own would wait for it in vain.
    if not isinstance(value, Tensor) or value.dim() > 0 or int not in kind.types or value.requires_grad:
        return False
    if value.is_meta or value.is_complex() or value.dtype == torch.bool:
        return False
    return float in kind.types or not value.is_floating_point()


def is_int(value: Any) -> bool:
    """An int as ``checked`` takes them."""
    return _is(value, _INT)


def check_one_device(where: str, **arguments: object) -> None:
    """Raises ValueError, naming the first two, if those arguments that are tensors are on different devices."""
    given = [(name, x.device) for name, x in arguments.items() if isinstance(x, Tensor)]
    for name, other in given[1:]:
        first, device = given[0]
        if other != device:
            raise ValueError(f"{where}: {first} is on {device}, {name} on {other}; one device is needed")


def shown(value: Any) -> str:
    """What came, in an error's line."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        wants = " that requires grad" if value.requires_grad else ""
        return f"{value.dtype} {list(value.shape)}{wants}"
    kind = type(value).__name__
    if isinstance(value, Number | str | Sequence):
        return f"{' '.join(_SHORT.repr(value).split())} ({kind})"
    return f"of type {kind}"
