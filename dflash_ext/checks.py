"""Checks that the public functions share. Their errors are one line, which names the argument."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Integral, Number, Real
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist = 2, 4


def check_tensors(where: str, **arguments: object) -> None:
    """Raises TypeError for an argument that is no tensor, and ValueError for tensors on different devices."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} is {shown(value)}; a tensor is needed")
    check_one_device(where, **arguments)


def check_one_device(where: str, **arguments: object) -> None:
    """Raises ValueError if the tensors among the arguments are on different devices. It names the first two."""
    given = [(name, x.device) for name, x in arguments.items() if isinstance(x, Tensor)]
    for name, other in given[1:]:
        first, device = given[0]
        if other != device:
            raise ValueError(f"{where}: {first} is on {device}, {name} on {other}; one device is needed")


def check_numbers(where: str, **arguments: object) -> None:
    """Raises TypeError for an argument that is neither a number nor None.

    A tensor is no number here. Its value would have to be read from the device, and it would get no gradient.
    """
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Real | SymFloat | SymInt):
            raise TypeError(f"{where}: {name} is {shown(value)}; a number or None is needed")


def is_int(value: Any) -> bool:
    """Whether a value is an integer: one of Python or numpy, or a tensor without dimensions. A bool is not."""
    if type(value) is int:
        return True
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, Integral | SymInt) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A short description of a value, for one line of an error message."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        wants = " that requires grad" if value.requires_grad else ""
        return f"{value.dtype} {list(value.shape)}{wants}"
    kind = type(value).__name__
    if isinstance(value, Number | str | Sequence):
        return f"{' '.join(_SHORT.repr(value).split())} ({kind})"
    return f"of type {kind}"
