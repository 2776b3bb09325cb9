"""Finds the keys that a mask function of transformers shows to each row, without evaluating it for every key.

transformers composes its masks from functions of four indices: batch entry, head, row and key. ``visible_run`` calls
such a function once, with a ``_Key`` in place of the key's index. Each comparison of the function with the ``_Key``
returns the interval of keys for which it holds. No tensor's values are read, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FAR = 1 << 40  # beyond every key


def visible_run(mask_function: Callable, batch_size: int, row: Tensor) -> tuple[Tensor, Tensor] | None:
    """The first key that each row sees and the one after its last.

    Args:
        mask_function: as transformers' mask functions, evaluated element by element.
        row: int64 ``[Lq]``, the rows' indices.

    Returns:
        Two int64 ``[B, Lq]``, or ``[1, Lq]`` if the function does not depend on the batch entry. The bounds may lie
        outside the existing keys. None for a function that does more than to compare a row with a key. Functions of
        packed documents and of image blocks, for example, look up where a key belongs.
    """
    entry = torch.arange(batch_size, device=row.device)[:, None]
    try:
        seen = mask_function(entry, torch.zeros_like(entry), row[None], _Key(torch.zeros_like(row[None])))
        run = _everything(row[None]) & seen
    except (TypeError, IndexError, AttributeError):  # the function does more with the key than to compare it
        return None
    return torch.broadcast_tensors(run.first, run.end)


class _Run:
    """The keys ``[first, end)``, with bounds of their own for every row."""

    def __init__(self, first: Tensor, end: Tensor) -> None:
        self.first, self.end, self.device = first, end, first.device

    def to(self, device: torch.device) -> _Run:
        return self

    def __and__(self, other: _Run | Tensor) -> _Run:
        if isinstance(other, Tensor):  # a condition on the row alone
            return _Run(self.first, torch.where(other, self.end, self.first))
        if not isinstance(other, _Run):
            return NotImplemented
        return _Run(torch.maximum(self.first, other.first), torch.minimum(self.end, other.end))

    __rand__ = __and__

    def __bool__(self) -> bool:
        raise TypeError("whether a row sees a key is not known here")


def _everything(row: Tensor) -> _Run:
    return _Run(torch.full_like(row, -_FAR), torch.full_like(row, _FAR))


class _Key:
    """The number ``(key + shift) // size``."""

    def __init__(self, shift: Tensor, size: int = 1) -> None:
        self.shift, self.size = shift, size

    def __sub__(self, number: int | Tensor) -> _Key:
        return _Key(self.shift - number * self.size, self.size)

    def __floordiv__(self, size: int) -> _Key:
        return _Key(self.shift, self.size * size) if isinstance(size, int) and size > 0 else NotImplemented

    def __rsub__(self, row: Tensor) -> _Difference:
        return _Difference(row, self) if self.size == 1 else NotImplemented

    def _first_at(self, number: int | Tensor) -> Tensor:
        """The first key whose ``(key + shift) // size`` is at least ``number``."""
        first = number * self.size - self.shift
        if first.is_floating_point():
            raise TypeError("a key was compared with a fraction")
        return first

    def __ge__(self, number: int | Tensor) -> _Run:
        first = self._first_at(number)
        return _Run(first, torch.full_like(first, _FAR))

    def __lt__(self, number: int | Tensor) -> _Run:
        end = self._first_at(number)
        return _Run(torch.full_like(end, -_FAR), end)

    def __gt__(self, number: int | Tensor) -> _Run:
        return self >= number + 1

    def __le__(self, number: int | Tensor) -> _Run:
        return self < number + 1

    def __eq__(self, number: int | Tensor) -> _Run:
        return (self >= number) & (self <= number)

    __hash__ = None


class _Difference:
    """``row - key``, of which only the absolute value can be compared."""

    def __init__(self, row: Tensor, key: _Key) -> None:
        self.row, self.key = row, key

    def __abs__(self) -> _Distance:
        return _Distance(self.row, self.key)


class _Distance:
    """``abs(row - key)``."""

    def __init__(self, row: Tensor, key: _Key) -> None:
        self.row, self.key = row, key

    def __le__(self, distance: int) -> _Run:
        return (self.key >= self.row - distance) & (self.key <= self.row + distance)

    def __lt__(self, distance: int) -> _Run:
        return self <= distance - 1
