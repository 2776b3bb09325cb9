"""The two ends of a decoding cycle: what its forwards need of the rows' state, and the commit. Beside them the ring of
what waits for the drafter, and a GPU's clock."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..native import load

load()
_begin_cycle = torch.ops.dflash_ext.begin_cycle.default
_end_cycle = torch.ops.dflash_ext.end_cycle.default
_write_ring = torch.ops.dflash_ext.write_ring.default
_read_ring = torch.ops.dflash_ext.read_ring.default
_mark_time = torch.ops.dflash_ext.mark_time.default

FIELDS = ("start", "anchor", "last", "active", "seed")  # the columns of the state


class CycleRows(NamedTuple):
    """What `begin_cycle` reads of B rows, K drafted tokens each.

    readings: int64 ``[7, B]``, whose rows are attributes: FIELDS, ``room`` and ``q_len``. ``room`` is how many drafted
    tokens the row has room for, 0 to K; ``q_len`` is how many tokens the target reads: one more, or 0 for a row that is
    not active.
    slots: int32 ``[B]``.
    positions: int64 ``[B, K + 1]``, of the anchor and of the drafted tokens that there is room for; -1 for others.
    block_positions, block_places: int64 ``[B, block]``, from the anchor on; the places of rows that are not active
    are -1.
    """

    readings: Tensor
    slots: Tensor
    positions: Tensor
    block_positions: Tensor
    block_places: Tensor

    start = property(lambda self: self.readings[0])
    anchor = property(lambda self: self.readings[1])
    last = property(lambda self: self.readings[2])
    active = property(lambda self: self.readings[3])
    seed = property(lambda self: self.readings[4])
    room = property(lambda self: self.readings[5])
    q_len = property(lambda self: self.readings[6])


def begin_cycle(state: Tensor, slots: Tensor, width: int, block: int) -> CycleRows:
    """Reads the state of rows.

    Args:
        state: int64 ``[S, 5]``, one row a slot, whose columns are FIELDS: the anchor's position (``start``), the
            ``anchor`` token, the ``last`` position that the target reads, whether the row is ``active``, a ``seed``.
        slots: int64 ``[B]``, the slots of the rows.
        width: K, the number of drafted tokens. block: the slots of a drafted block.

    Raises RuntimeError for tensors that do not fit together, and on the CPU for a slot that does not exist.
    """
    return CycleRows(*_begin_cycle(state, slots, width, block))


def end_cycle(
    state: Tensor,
    slots: Tensor,
    stops: Tensor,
    rows: CycleRows,
    drafted: Tensor,
    accepted: Tensor,
    next_token: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Commits the accepted tokens of every active row and the token after them, in ``state``.

    A row ends (it is active no more) if one of these tokens is among its stop tokens, if the token after ``last`` is
    one of them, or if the logit of its next token is not finite.

    Args:
        stops: int64 ``[S, n]``, the stop tokens of every slot, -1 for none.
        drafted: int64 ``[B, K]``. accepted, next_token: int64 ``[B]``, as `verify` gives them.
        logits: the target's, floating ``[B, K + 1, V]``, contiguous.

    Returns:
        Records int64 ``[B, 4 + K]``: whether the row was active, how many drafted tokens were verified, how many were
        accepted, the token after them (-1 if its logit is not finite), the drafted tokens. And the positions of the
        committed tokens that the target has read, int64 ``[B, K + 1]``, -1 elsewhere.

    Raises RuntimeError for tensors that do not fit together.
    """
    return _end_cycle(state, slots, stops, rows.readings, drafted, accepted, next_token, logits)


def write_ring(ring: Tensor, values: Tensor, positions: Tensor, slots: Tensor) -> None:
    """Keeps what belongs to tokens in the ring of their row's slot. That of position p is in place p % N.

    Args:
        ring: ``[S, N, W]`` of any dtype, contiguous: the last N tokens of every slot. It is written.
        values: ``[B, R, W]`` in the ring's dtype, contiguous.
        positions: int64 ``[B, R]``. Tokens with a negative position are not kept. Those of a row differ by less than N.
        slots: int32 ``[B]``.

    Raises RuntimeError for tensors that do not fit together, and on the CPU for a slot that does not exist.
    """
    _write_ring(ring, values, positions, slots)


def read_ring(ring: Tensor, start: Tensor, counts: Tensor, slots: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """What `write_ring` has kept of the last ``counts`` tokens before ``start``.

    Args:
        ring: ``[S, N, W]``, as in `write_ring`.
        start, counts: int64 ``[B]``, one more than the last token's position, and the number of tokens.
        slots: int32 ``[B]``.
        tokens: R, the number of columns, at least the largest number of tokens.

    Returns the values ``[B, R, W]`` and the positions int64 ``[B, R]``: zeros and -1 behind the last token, and for
    tokens whose position is negative or whose place a later one has taken.

    Raises RuntimeError for tensors that do not fit together, and on the CPU for a slot that does not exist.
    """
    return _read_ring(ring, start, counts, slots, tokens)


def mark_time(like: Tensor) -> Tensor:
    """The time at which the GPU reaches this call, in nanoseconds of its clock: int64 ``[]`` on the device of `like`.

    A replay of a CUDA graph writes it again. It takes about a microsecond, where an event within a graph takes seven.

    Raises RuntimeError on the CPU.
    """
    return _mark_time(like)


@torch.library.register_fake("dflash_ext::begin_cycle")
def _(state, slots, width, block):
    rows = slots.shape[0]
    shapes = (rows, width + 1), (rows, block), (rows, block)
    readings, slots32 = state.new_empty(len(FIELDS) + 2, rows), state.new_empty(rows, dtype=torch.int32)
    return readings, slots32, *(state.new_empty(shape) for shape in shapes)


@torch.library.register_fake("dflash_ext::write_ring")
def _(ring, values, positions, slots):
    return None


@torch.library.register_fake("dflash_ext::read_ring")
def _(ring, start, counts, slots, tokens):
    rows = slots.shape[0]
    return ring.new_empty(rows, tokens, ring.shape[2]), start.new_empty(rows, tokens)


@torch.library.register_fake("dflash_ext::mark_time")
def _(like):
    return like.new_empty((), dtype=torch.int64)


@torch.library.register_fake("dflash_ext::end_cycle")
def _(state, slots, stops, readings, drafted, accepted, next_token, logits):
    rows, width = drafted.shape
    return state.new_empty(rows, 4 + width), state.new_empty(rows, width + 1)
