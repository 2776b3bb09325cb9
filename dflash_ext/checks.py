"""Checks that the public functions share. Their errors are one line, which names the argument."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist = 2, 4
_NUMBERS = Real, SymFloat, SymInt
_NONE: Mapping[str, object] = {}


def check_tensors(
    where: str,
    *,
    optional: Mapping[str, object] = _NONE,
    numbers: Mapping[str, object] = _NONE,
    **arguments: object,
) -> None:
    """Raises TypeError for an argument of the wrong kind, and ValueError for what `check_operands` refuses.

    Args:
        optional: arguments that are a tensor or None, by their names.
        numbers: those that are a real number, a tensor of real numbers or None.
        arguments: those that are a tensor.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} is {shown(value)}; a tensor is needed")
    for name, value in optional.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} is {shown(value)}; a tensor or None is needed")
    for name, value in numbers.items():
        fits = not value.is_complex() if isinstance(value, Tensor) else value is None or isinstance(value, _NUMBERS)
        if not fits:
            raise TypeError(f"{where}: {name} is {shown(value)}; a real number, a tensor of them or None is needed")
    check_operands(where, **arguments, **optional, **numbers)


def check_operands(where: str, **arguments: object) -> None:
    """Raises ValueError unless the tensors among the arguments are dense (not sparse, not nested) and on one device."""
    first, device = None, None
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        if x.layout != torch.strided or x.is_nested:
            kind = "nested" if x.is_nested else x.layout
            raise ValueError(f"{where}: {name} is a {kind} tensor; a dense one (torch.strided) is needed")
        if device is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{where}: {first} is on {device}, {name} on {x.device}; one device is needed")


def check_numbers(where: str, *, needed: Mapping[str, object] = _NONE, **arguments: object) -> None:
    """Raises TypeError for an argument that is neither a number nor None, and for one of `needed` that is no number.

    A tensor is no number here. Its value would have to be read from the device, and it would get no gradient.
    """
    for name, value in needed.items():
        if not isinstance(value, _NUMBERS):
            raise TypeError(f"{where}: {name} is {shown(value)}; a number is needed")
    for name, value in arguments.items():
        if value is not None and not isinstance(value, _NUMBERS):
            raise TypeError(f"{where}: {name} is {shown(value)}; a number or None is needed")


def is_int(value: Any) -> bool:
    """Whether a value is an integer: one of Python or numpy, or a tensor without dimensions. A bool is not."""
    if type(value) is int:
        return True
    if isinstance(value, Tensor):
        return value.dim() == 0 and has_integers(value)
    return isinstance(value, Integral | SymInt) and not isinstance(value, bool)


def has_integers(x: Tensor) -> bool:
    """Whether the entries of a tensor are integers. Those of a bool tensor are not."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


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
