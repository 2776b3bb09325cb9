"""What ``linear_cross_entropy`` consists of: matrix products around the native loss kernel, and their autograd.

Under torch.compile it is an opaque operator, since torch.compile can neither follow a number of rows that is read back
nor gain from a loop over chunks that it unrolls. Otherwise it is an autograd function, which takes less time to call.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import differentiable, differentiable_once, first_derivatives
from .loss import OPTIONS_SCHEMA, real_dtype

_native = torch.ops.dflash_ext
_OP = "linear_cross_entropy"

_CALL_SCHEMA = (
    "Tensor hidden, Tensor head, Tensor target, Tensor? weight, Tensor? teacher, Tensor? teacher_head, "
    "Tensor? teacher_row, SymInt? max_rows, SymInt chunk_rows, SymInt kept_rows"
)
_OPTIONS_SCHEMA = f"float teacher_softcap, {OPTIONS_SCHEMA}"


class _Call(NamedTuple):
    """The arguments of an operator that say which loss of which rows it computes.

    Attributes:
        hidden, head, target, weight: ``[T, H]``, ``[V, H]``, ``[T]`` and ``[T]`` or None.
        teacher: None, the teacher's logits ``[R, V]``, or, with ``teacher_head [V, G]``, its hidden states ``[R, G]``.
        teacher_row: ``[T]``, the teacher's row for each row; None if R is T and the rows are the same.
        max_rows: a bound on the rows that count, or None.
        chunk_rows: how many rows the loss kernel handles at a time.
        kept_rows: up to how many rows of logits exist at a time when the head is trained.
        teacher_softcap: of the logits that are computed from the teacher's hidden states; 0 for none.
        options: the loss kernel's options, in the order of its schema.
    """

    hidden: Tensor
    head: Tensor
    target: Tensor
    weight: Tensor | None
    teacher: Tensor | None
    teacher_head: Tensor | None
    teacher_row: Tensor | None
    max_rows: int | None
    chunk_rows: int
    kept_rows: int
    teacher_softcap: float
    options: tuple

    @classmethod
    def of(cls, sized: tuple, options: tuple) -> "_Call":
        """From the arguments of `_CALL_SCHEMA` and those of `_OPTIONS_SCHEMA`.

        Raises RuntimeError on the CPU for a row that counts with a target outside the vocabulary or a teacher's row
        that does not exist. On CUDA such a row becomes NaN.
        """
        teacher_softcap, *rest = options
        call = cls(*sized, teacher_softcap, tuple(rest))
        outside = rows_outside(_OP, call.weight, call.target, len(call.head))
        if call.teacher_row is not None:
            outside |= rows_outside(
                _OP, call.weight, call.teacher_row, len(call.teacher), "teacher_row", "the teacher's rows"
            )
        return call._replace(target=call.target.masked_fill(outside, -1))

    @property
    def padding(self) -> Tensor | None:
        """The weights if rows that do not count may be among those that are computed, otherwise None."""
        return None if self.max_rows is None else self.weight

    def rows_that_count(self) -> tuple[Tensor | None, Tensor | None]:
        """The rows to compute, and those that are too many, as the function of this name gives them."""
        return rows_that_count(_OP, len(self.target), self.weight, self.max_rows)


# ------------------------------------------------------------------- what is computed


def _losses(
    call: _Call, rows: Tensor | None, x: Tensor | None, make_hidden: bool, keep: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """losses, nll, correct and entropy, [T] each, of which the K given rows (None for all) are computed.

    x: hidden[rows] [K, H] with zeros in the rows that do not count; None if it is not made yet.
    Then the gradients of the sum of losses with respect to hidden[rows] [K, H] and to their logits [K, V]. make_hidden
    and keep ask for them; they are empty otherwise, and the latter also if K is more than kept_rows.
    """
    hidden, head = call.hidden, call.head
    count = len(hidden) if rows is None else len(rows)
    keep = keep and count <= call.kept_rows
    real = real_dtype(hidden)
    results = [hidden.new_zeros(len(hidden), dtype=dtype) for dtype in (real, real, torch.bool, real)]
    grad_rows = hidden.new_empty(count if make_hidden else 0, hidden.shape[1])
    kept = hidden.new_empty(count if keep else 0, len(head))
    # What is kept exists in full anyway, unlike a teacher's distributions.
    size = max(count, 1) if keep and call.teacher is None else call.chunk_rows
    for span, chunk in _chunks(len(hidden), rows, size):
        logits = kept[span] if keep else hidden.new_empty(span.stop - span.start, len(head))
        part = rows_of(hidden, call.padding, chunk) if x is None else x[span].contiguous()
        _loss_of(call, chunk, part, logits, results, make_gradient=keep or make_hidden)
        if make_hidden:
            torch.mm(logits, head, out=grad_rows[span])
        del logits  # before the next chunk's
    return results, grad_rows, kept


def _gradients(
    call: _Call,
    rows: Tensor | None,
    grad_losses: Tensor,
    made: Tensor,
    kept: Tensor,
    train_hidden: bool,
    train_head: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden[rows] [K, H] and of head, from grad_losses ([] or [T]) and what the forward made.

    If it made nothing, the logits are computed again.
    """
    scale = grad_losses.expand(len(call.hidden))
    if call.weight is not None:  # if a gradient overflowed, 0 * inf would be NaN in the rows that do not count
        scale = scale.masked_fill(call.weight == 0, 0.0)
    index = slice(None) if rows is None else rows
    if not (len(made) or len(kept)):
        weight = scale.contiguous() if call.weight is None else call.weight * scale
        return _recomputed(call._replace(weight=weight), rows, train_hidden, train_head)
    scale = scale[index, None]
    grad_rows = grad_head = None
    if train_head:
        grad_head = kept.T @ rows_of(call.hidden, call.padding, index).mul_(scale)
    if train_hidden:
        grad_rows = torch.mul(made, scale, out=torch.empty_like(made)) if len(made) else (kept @ call.head).mul_(scale)
    return grad_rows, grad_head


def _recomputed(
    call: _Call, rows: Tensor | None, train_hidden: bool, train_head: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden[rows] and head, for which logits are computed again, kept_rows rows at a time."""
    hidden, head = call.hidden, call.head
    count = len(hidden) if rows is None else len(rows)
    grad_rows = hidden.new_empty(count, hidden.shape[1]) if train_hidden else None
    grad_head = None
    for span, chunk in _chunks(len(hidden), rows, call.kept_rows):
        logits = hidden.new_empty(span.stop - span.start, len(head))
        for part, index in _chunks(len(hidden), chunk, call.chunk_rows):
            _loss_of(call, index, rows_of(hidden, call.padding, index), logits[part], None, make_gradient=True)
        if train_hidden:
            torch.mm(logits, head, out=grad_rows[span])
        if train_head:
            x = rows_of(hidden, call.padding, chunk)
            grad_head = logits.T @ x if count <= call.kept_rows else _added(grad_head, logits.T, x)
        del logits  # before the next chunk's
    if train_head:
        grad_head = torch.zeros_like(head) if grad_head is None else grad_head.to(head.dtype)
    return grad_rows, grad_head


def _loss_of(
    call: _Call,
    rows: slice | Tensor,
    x: Tensor,
    logits: Tensor,
    results: list[Tensor] | None,
    *,
    make_gradient: bool,
) -> None:
    """Fills logits with those of some rows, whose hidden states are x, or with their gradient, and the rows of results
    unless there are none."""
    torch.mm(x, call.head.T, out=logits)
    beside = (None if each is None else each[rows][None] for each in (call.target, call.weight))
    teacher = _teacher_logits(call, rows)
    # The operator whose name ends in an underscore turns the logits into their gradient in place.
    loss = _native.masked_cross_entropy_ if make_gradient else _native.masked_cross_entropy
    parts = loss(logits[None], *beside, None if teacher is None else teacher[None], *call.options)
    for result, part in zip(results or (), parts, strict=False):
        result[rows] = part[0]


def rows_outside(
    op: str, weight: Tensor | None, index: Tensor, size: int, name: str = "target", what: str = "the vocabulary"
) -> Tensor:
    """Which rows count and have an index outside ``[0, size)``. On the CPU the first one raises RuntimeError."""
    outside = (index < 0) | (index >= size)
    if weight is not None:
        outside &= weight != 0
    if index.is_cpu and outside.any():
        row = int(outside.nonzero()[0])
        raise RuntimeError(
            f"{op}: {name} {int(index[row])} of row {row} is outside {what} [0, {size}); "
            "rows that do not count have a weight of 0 or the target ignore_index"
        )
    return outside


def rows_of(hidden: Tensor, weight: Tensor | None, rows: slice | Tensor) -> Tensor:
    """A copy of some rows of hidden, with zeros in the rows that do not count."""
    x = hidden[rows]
    if isinstance(rows, slice):
        # oneDNN's bfloat16 product also reads the memory between rows, from which NaN could reach the result.
        x = x.clone(memory_format=torch.contiguous_format)
    if weight is not None:  # rows that do not count may hold NaN, and zero times NaN is NaN
        x.masked_fill_((weight[rows] == 0)[:, None], 0.0)
    return x


def _in_place_of(rows: Tensor | None, part: Tensor, hidden: Tensor) -> Tensor:
    """Zeros like hidden, with the given rows at their places; all rows if rows is None."""
    if rows is None:
        return part
    full = torch.zeros_like(hidden)
    full[rows] = part
    return full


def _teacher_logits(call: _Call, rows: slice | Tensor) -> Tensor | None:
    """The teacher's logits for some rows, in the dtype of hidden."""
    if call.teacher is None:
        return None
    if call.teacher_row is not None:
        rows = call.teacher_row[rows]
        rows = rows.where((rows >= 0) & (rows < len(call.teacher)), 0)
    logits = call.teacher[rows]
    if call.teacher_head is not None:
        logits = logits.contiguous() @ call.teacher_head.T
        if call.teacher_softcap:
            logits = logits.div_(call.teacher_softcap).tanh_().mul_(call.teacher_softcap)
    return logits.to(call.hidden.dtype)


def rows_that_count(
    op: str, rows: int, weight: Tensor | None, max_rows: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """The indices of the rows to compute (None for all), and which rows that count are not among them (None if all
    are)."""
    if weight is None:
        if max_rows is not None and rows > max_rows:
            raise ValueError(f"{op}: {rows} rows count, more than max_rows = {max_rows}")
        return None, None
    counts = weight != 0
    if max_rows is None:
        kept = counts.nonzero()[:, 0]
        return (None if len(kept) == rows else kept), None
    if max_rows >= rows:
        return None, None
    rank = counts.cumsum(0)
    if weight.is_cpu and rank[-1] > max_rows:
        raise ValueError(f"{op}: {int(rank[-1])} rows count, more than max_rows = {max_rows}")
    # A stable sort puts the rows that count first; the kernel skips whatever follows them.
    return torch.argsort(~counts, stable=True)[:max_rows], counts & (rank > max_rows)


def _chunks(total: int, rows: slice | Tensor | None, size: int) -> Iterator[tuple[slice, slice | Tensor]]:
    """For each chunk of the rows (None for all), its place among them, and an index of it among all rows."""
    first, count = 0, total
    if isinstance(rows, slice):
        first, count = rows.start, rows.stop - rows.start
    elif rows is not None:
        count = len(rows)
    for start in range(0, count, size):
        span = slice(start, min(start + size, count))
        if isinstance(rows, Tensor):
            yield span, rows[span]
        else:
            yield span, slice(first + span.start, first + span.stop)


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, summed in float32, or in float64 for float64; total may be overwritten, and None is 0."""
    real = real_dtype(a)
    if a.dtype == real or not a.is_cuda:
        a, b = a.to(real), b.to(real)
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=real)
    return torch.addmm(total, a, b, out_dtype=real, out=total)


# ------------------------------------------------------------------- without torch.compile

# Here the number of rows may be read back. If the head is trained, the rows that count are selected in a node of their
# own, so that the gradient of all rows is allocated when the logits are freed. Otherwise a chunk is selected at a time.


def loss_of_rows(sized: tuple, options: tuple, per_row: bool, train_hidden: bool, train_head: bool) -> tuple:
    """What the operator below returns first: losses, nll, correct and entropy."""
    call = _Call.of(sized, options)
    rows, overflow = call.rows_that_count()
    x = call.hidden
    is_selected = train_head and (rows is not None or call.padding is not None)
    if is_selected:
        x = _Selected.apply(x, call.padding, rows)
    made = train_hidden and not train_head, train_head
    return _Loss.apply(x, call.head, call, rows, overflow, per_row, is_selected, *made)


class _Selected(torch.autograd.Function):
    """The given rows of hidden (None for all), with zeros in the rows that do not count."""

    @staticmethod
    def forward(ctx, hidden, weight, rows):
        ctx.save_for_backward(hidden, rows)
        return rows_of(hidden, weight, slice(None) if rows is None else rows)

    @staticmethod
    def backward(ctx, grad):
        hidden, rows = ctx.saved_tensors
        if rows is None:
            return grad, None, None
        return torch.zeros_like(hidden).index_put_((rows,), grad), None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head, call, rows, overflow, per_row, is_selected, make_hidden, keep):
        """x: hidden, or with is_selected those of its rows that are computed."""
        (losses, *others), made, kept = _losses(call, rows, x if is_selected else None, make_hidden, keep)
        if overflow is not None:
            losses.masked_fill_(overflow, torch.nan)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        # Not selected rows: while the gradients are made, they would take memory, and can be read from hidden again.
        ctx.save_for_backward(*call[:7], rows, made, kept)
        ctx.numbers, ctx.is_selected = call[7:], is_selected
        return losses if per_row else losses.sum(), *others

    @staticmethod
    def backward(ctx, grad_losses, *_):
        if grad_losses is None:
            return (None,) * 9
        *tensors, rows, made, kept = ctx.saved_tensors
        call, trained = _Call(*tensors, *ctx.numbers), ctx.needs_input_grad[:2]
        with torch.no_grad():
            grad_hidden, grad_head = _gradients(call, rows, grad_losses, made, kept, *trained)
            if grad_hidden is not None and not ctx.is_selected:
                grad_hidden = _in_place_of(rows, grad_hidden, call.hidden)
        return *first_derivatives(_OP, (grad_hidden, grad_head), (call.hidden, call.head)), *[None] * 7


# ------------------------------------------------------------------- the operators of torch.compile


@torch.library.custom_op(
    "dflash_ext::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_CALL_SCHEMA}, bool per_row, bool make_hidden, bool keep, {_OPTIONS_SCHEMA}) -> (Tensor losses, "
    "Tensor nll, Tensor correct, Tensor entropy, Tensor grad_hidden, Tensor grad_logits, Tensor rows)",
)
def _forward(*inputs):
    """The losses of hidden [T, H] (with per_row [T], else their sum []), then nll, correct and entropy, each [T].

    Only the losses have a gradient. make_hidden asks for the gradient of the sum of losses with respect to hidden. keep
    asks for the gradient with respect to the logits, [K, V], and for the rows [K] that it belongs to; rows is empty if
    these are all rows, and both are empty if K is more than kept_rows. What is not asked for is empty.
    """
    call, per_row, make_hidden, keep = _Call.of(inputs[:10], inputs[13:]), *inputs[10:13]
    rows, overflow = call.rows_that_count()
    (losses, *others), made, kept = _losses(call, rows, None, make_hidden, keep)
    if overflow is not None:
        losses.masked_fill_(overflow, torch.nan)
    grad_hidden = _in_place_of(rows, made, call.hidden) if make_hidden else call.hidden.new_empty(0)
    kept_rows = rows if len(kept) and rows is not None else call.target.new_empty(0)
    return losses if per_row else losses.sum(), *others, grad_hidden, kept, kept_rows


@torch.library.custom_op(
    "dflash_ext::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor grad_losses, Tensor grad_hidden, Tensor grad_logits, Tensor rows, "
    f"{_CALL_SCHEMA}, bool train_hidden, bool train_head, {_OPTIONS_SCHEMA}) -> (Tensor grad_hidden, Tensor grad_head)",
)
def _backward_of(grad_losses, made, kept, rows, *inputs):
    """The gradients of hidden and head from grad_losses ([] or [T]) and from what the forward made or kept."""
    call, trained = _Call.of(inputs[:10], inputs[12:]), inputs[10:12]
    if len(made):
        rows = None
    elif len(kept):
        rows = rows if len(rows) else None
    else:
        rows, _ = call.rows_that_count()
    grad_rows, grad_head = _gradients(call, rows, grad_losses, made, kept, *trained)
    empty = call.hidden.new_empty(0)
    grad_hidden = empty if grad_rows is None else _in_place_of(rows, grad_rows, call.hidden)
    return grad_hidden, empty if grad_head is None else grad_head


@_forward.register_fake
def _(*inputs):
    hidden, head, target, weight, *_, max_rows, _, kept_rows, per_row, make_hidden, keep = inputs[:13]
    real, total = real_dtype(hidden), hidden.shape[0]
    is_all = weight is None or (max_rows is not None and max_rows >= total)
    count = total if is_all else max_rows
    keep = keep and count is not None and count <= kept_rows
    return (
        hidden.new_empty(target.shape if per_row else (), dtype=real),
        *(hidden.new_empty(target.shape, dtype=dtype) for dtype in (real, torch.bool, real)),
        torch.empty_like(hidden) if make_hidden else hidden.new_empty(0),
        hidden.new_empty(count if keep else 0, head.shape[0]),
        target.new_empty(count if keep and not is_all else 0),
    )


@_backward_of.register_fake
def _(grad_losses, made_hidden, kept, rows, *inputs):
    return tuple(
        torch.empty_like(x) if train else x.new_empty(0) for x, train in zip(inputs[:2], inputs[10:12], strict=True)
    )


def _keep(ctx, inputs, output):
    ctx.sizes, ctx.options = inputs[7:10], inputs[13:]
    _, *others, grad_hidden, grad_logits, rows = output
    ctx.mark_non_differentiable(*others, grad_hidden, grad_logits, rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_logits, rows, *inputs[:7])


def _backward(ctx, grad_losses, *_):
    nothing = [None] * (13 + len(ctx.options))
    if grad_losses is None:
        return tuple(nothing)
    trained = ctx.needs_input_grad[:2]
    grads = _loss_backward(grad_losses, *ctx.saved_tensors, *ctx.sizes, *trained, *ctx.options)
    return *(grad if train else None for grad, train in zip(grads, trained, strict=True)), *nothing[2:]


_loss_backward = differentiable_once(_OP)
traced_loss_of_rows = differentiable(_OP, _keep, _backward)
