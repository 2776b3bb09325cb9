"""Faults that end one request and leave the others running."""

from __future__ import annotations

import traceback


def detached(fault: BaseException) -> BaseException:
    """The fault, without references to the frames that it has passed, and with a note that says where it was raised.

    A traceback keeps the tensors of all its frames alive, and those of the frames that called them.
    """
    if fault.__traceback__ is not None:
        where = "".join(traceback.format_tb(fault.__traceback__))
        fault.add_note(f"It was raised here:\n{where.rstrip()}")
    each: BaseException | None = fault
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return fault
