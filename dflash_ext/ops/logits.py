"""What the operators on logits share: checks, and filters in the form that the native operators take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_numbers

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The bounds of numbers that are not 0. Numbers beyond them, or their inverses, do not fit into float32.
_RANGES = {
    "temperature": (1e-30, 1e30),
    "top_k": (1, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-30, 1e30),
    "presence_penalty": (-1e30, 1e30),
    "frequency_penalty": (-1e30, 1e30),
}


def by_row(op: str, shape: torch.Size, **numbers: float | Tensor | None) -> dict[str, float | Tensor | None]:
    """Checks parameters that are one number or one per row. Tensors, [] or of the rows' ``shape``, become ``[N]``."""
    if "temperature" in numbers and numbers["temperature"] is None:
        raise TypeError(f"{op}: temperature is None; a number or a tensor is needed")
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            if value.dim() > 0 and value.shape != shape:
                raise ValueError(f"{op}: {name} is a tensor {list(value.shape)}; a number or {list(shape)} is needed")
            numbers[name] = value.expand(shape).flatten()
        elif value is not None and (name, value) != ("top_k", -1):
            least, most = _RANGES.get(name, (0.0, math.inf))
            takes_0 = name != "repetition_penalty"
            if not least <= value <= most and not (takes_0 and value == 0):
                allowed = f"{'0 or ' if takes_0 else ''}a number from {least:g} to {most:g}"
                raise ValueError(f"{op}: {name} is {value}; {allowed} is needed")
    return numbers


def cap_of(op: str, softcap: float | None) -> float:
    """A bound on the size of logits, as the native operators take it: 0 for none."""
    check_numbers(op, softcap=softcap)
    if softcap and not 1e-30 < softcap < 1e30:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive, or None or 0 for none")
    return float(softcap or 0.0)


def check_last_dim(op: str, name: str, logits: Tensor) -> None:
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} must be contiguous, its stride is {logits.stride(-1)}")


def real_dtype(logits: Tensor) -> torch.dtype:
    """The precision of sums and of everything per row."""
    return torch.promote_types(logits.dtype, torch.float32)


def as_contiguous(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def number_and_tensor(value: float | Tensor | None, off: float, real: torch.dtype) -> tuple[float, Tensor | None]:
    """A parameter as two arguments of a native operator: a number, and a tensor that replaces it or None."""
    if isinstance(value, Tensor):
        return off, as_contiguous(value, real)
    return (off if value is None else float(value)), None


def filter_arguments(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
) -> tuple[float | Tensor | None, ...]:
    """The temperature and the filters as arguments of a native operator: four numbers, then four tensors or None."""
    given = (temperature, 1.0), (top_k, 0.0), (top_p, 1.0), (min_p, 0.0)
    numbers, tensors = zip(*(number_and_tensor(value, off, real_dtype(logits)) for value, off in given), strict=True)
    return *numbers, *tensors
