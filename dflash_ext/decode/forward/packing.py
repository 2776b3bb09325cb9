"""Packs the weights of neighbouring projections into one matrix, of which the modules' own parameters become views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def packed(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters one below the other, `[sum of rows, ...]`.

    Their memory is moved into one tensor, and each parameter becomes a view of its rows, so that the model exists once
    and its own modules go on working. Parameters that are packed already are left as they are.
    """
    first = parameters[0]
    rows = sum(len(parameter) for parameter in parameters)
    if not _are_neighbours(parameters):
        repoint(parameters, torch.cat([parameter.detach() for parameter in parameters]))
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def repoint(parameters: Sequence[nn.Parameter], whole: Tensor) -> None:
    """Makes parameters views of a tensor that begins with their values, one below the other."""
    at = 0
    for parameter in parameters:
        parameter.data = whole[at : at + len(parameter)]
        at += len(parameter)


def _are_neighbours(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether each parameter's memory begins where that of the one before ends, in one allocation."""
    storage = parameters[0].untyped_storage().data_ptr()
    end = parameters[0].data_ptr()
    for parameter in parameters:
        if not parameter.is_contiguous() or parameter.untyped_storage().data_ptr() != storage:
            return False
        if parameter.data_ptr() != end:
            return False
        end += parameter.numel() * parameter.element_size()
    return True
