"""Cross-entropy straight from hidden states and the vocabulary head, without the [T, V] logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import check_one_device, shown
from ..reference import CrossEntropy
from .autograd import refuse_forward_mode, refuse_second_derivative
from .backends import warn_of_portable_kernels
from .devices import autocast
from .loss import DTYPES, OPTIONS_SCHEMA, check_normaliser, check_rows, options_of, real_dtype, reduced, weight_of

_native = torch.ops.dflash_ext
_OP = "linear_cross_entropy"

# How many logits exist at a time. On a GPU these are enough rows for the matrix products to run at full speed.
_LOGITS_AT_A_TIME = {"cuda": 160 << 20, "cpu": 16 << 20}


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    max_rows: int | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normaliser: float | Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Tensor | None = None,
    teacher_kind: str = "kl",
    teacher_mix: float = 0.0,
    chunk_rows: int | None = None,
) -> CrossEntropy:
    """``masked_cross_entropy`` of ``hidden @ head.T``, a chunk of rows at a time, only for rows that count.

    It is composed of matrix products and the native loss kernel, which turns a chunk of logits into its gradient in
    place. The forward computes the gradients while the logits exist, and the backward only scales them. With a
    trainable head (``head.requires_grad``) and reduction "none", the backward computes the logits again instead. The
    head's gradient is summed in float32.

    Args:
        hidden: ``[..., H]`` float32, bfloat16 or float16, on the CPU also float64.
        head: ``[V, H]`` of the same dtype. Under autocast both and the teacher are cast, unless one is float64.
        target: ``[...]`` integer; see ``masked_cross_entropy``.
        weight: ``[...]``, or None for ones. Rows of weight 0, and rows whose target is ``ignore_index``, are left out
            of the matrix products.
        max_rows: a bound on the number of rows that count. With it, nothing waits for the device, and ``max_rows`` rows
            are computed. If more rows count, it is an error on the CPU, and on CUDA the loss is NaN. Without it, the
            number of rows that count is read back from the device, unless weight and ignore_index are both None, so
            that all rows count.
        chunk_rows: rows of logits that exist at a time; None chooses by the size of the vocabulary.
        ignore_index, reduction, normaliser, softcap, label_smoothing, z_loss, teacher, teacher_kind, teacher_mix: as
            in ``masked_cross_entropy``; ``teacher`` holds logits ``[..., V]``.

    Returns:
        CrossEntropy as ``masked_cross_entropy`` does, in the order of the rows given, with zeros for rows of
        weight 0.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; on the CPU, more rows than
            ``max_rows``.
        TypeError: a tensor where a number is needed, since it would get no gradient.
        RuntimeError: a target outside the vocabulary (CPU); a second derivative.
    """
    options = options_of(_OP, reduction, softcap, label_smoothing, z_loss, teacher, teacher_kind, teacher_mix)
    check_normaliser(_OP, normaliser, reduction)
    check_one_device(
        _OP, hidden=hidden, head=head, target=target, weight=weight, teacher=teacher, normaliser=normaliser
    )
    refuse_forward_mode(_OP, hidden, head)
    hidden, head, teacher = autocast(hidden, head, teacher)
    _check(hidden, head, target, weight, teacher, max_rows, chunk_rows)
    shape, vocab = target.shape, head.shape[0]
    target = target.flatten().to(torch.int64)
    weight = None if weight is None else weight.flatten()
    weight = weight_of(target, weight, ignore_index, real_dtype(hidden))
    per_row = reduction == "none"
    train_hidden, train_head = (x.requires_grad and torch.is_grad_enabled() for x in (hidden, head))
    losses, nll, correct, entropy, *_ = _native.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        target,
        weight,
        None if teacher is None else teacher.detach().reshape(-1, vocab),
        max_rows,
        chunk_rows or _rows_at_a_time(hidden.device, vocab),
        per_row,
        train_hidden and not (train_head and per_row),
        train_head and not per_row,
        *options,
    )
    warn_of_portable_kernels(hidden.device)
    loss = losses.view(shape) if per_row else reduced(losses, target, weight, reduction, normaliser)
    return CrossEntropy(loss, nll.view(shape), correct.view(shape), entropy.view(shape))


def _rows_at_a_time(device: torch.device, vocab: int) -> int:
    """A multiple of what the matrix products handle at a time."""
    logits = _LOGITS_AT_A_TIME["cuda" if device.type == "cuda" else "cpu"]
    return max(256, logits // vocab // 256 * 256)


def _check(hidden, head, target, weight, teacher, max_rows, chunk_rows) -> None:
    shape = hidden.shape[:-1]
    if hidden.dim() == 0 or head.dim() != 2 or hidden.shape[-1] != head.shape[1] or len(head) == 0:
        raise ValueError(
            f"{_OP}: hidden is {list(hidden.shape)}, head is {list(head.shape)}; [..., H] and [V, H] are needed, V > 0"
        )
    if hidden.dtype not in DTYPES or hidden.dtype != head.dtype:
        raise ValueError(
            f"{_OP}: hidden is {hidden.dtype}, head is {head.dtype}; "
            "float32, bfloat16, float16 or float64 is needed, one for both"
        )
    check_rows(_OP, "hidden", shape, target, weight)
    if teacher is not None and (teacher.shape, teacher.dtype) != ((*shape, len(head)), hidden.dtype):
        raise ValueError(f"{_OP}: teacher is {shown(teacher)}; it must be {hidden.dtype} {[*shape, len(head)]}")
    for name, bound in (("max_rows", max_rows), ("chunk_rows", chunk_rows)):
        if bound is not None and bound < 1:
            raise ValueError(f"{_OP}: {name} is {bound}; it must be at least 1")


# ------------------------------------------------------------------- the operators

# They are opaque to torch.compile, which can neither follow a number of rows that is read back nor gain from a loop
# over chunks that it unrolls.


@torch.library.custom_op(
    "dflash_ext::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor head, Tensor target, Tensor? weight, Tensor? teacher, SymInt? max_rows, "
    f"SymInt chunk_rows, bool per_row, bool make_hidden, bool make_head, {OPTIONS_SCHEMA}) -> (Tensor losses, "
    "Tensor nll, Tensor correct, Tensor entropy, Tensor grad_hidden, Tensor grad_head)",
)
def _forward(hidden, head, target, weight, teacher, max_rows, chunk_rows, per_row, make_hidden, make_head, *options):
    """The losses of hidden [T, H] (with per_row [T], else their sum []), then nll, correct and entropy, each [T].

    Only the losses have a gradient. make_hidden and make_head ask for these gradients of the sum of losses as well;
    without them the last two results are empty.
    """
    _check_targets(target, weight, len(head))
    rows, overflow = _rows_that_count(weight, max_rows)
    (losses, *others), *grads = _by_chunks(
        hidden, head, target, weight, teacher, rows, chunk_rows, make_hidden, make_head, options
    )
    if overflow is not None:
        losses.masked_fill_(overflow, torch.nan)
    grads = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return losses if per_row else losses.sum(), *others, *grads


@torch.library.custom_op(
    "dflash_ext::linear_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor grad_losses, Tensor? grad_hidden, Tensor? grad_head, Tensor hidden, Tensor head, Tensor target, "
    "Tensor? weight, Tensor? teacher, SymInt? max_rows, SymInt chunk_rows, bool train_hidden, bool train_head, "
    f"{OPTIONS_SCHEMA}) -> (Tensor grad_hidden, Tensor grad_head)",
)
def _gradients(
    grad_losses,
    grad_hidden,
    grad_head,
    hidden,
    head,
    target,
    weight,
    teacher,
    max_rows,
    chunk_rows,
    train_hidden,
    train_head,
    *options,
):
    """Scales the gradients that the forward made. If it made none, computes them, with grad_losses per row."""
    if grad_hidden is None and grad_head is None:
        # If a gradient overflowed, 0 * inf would be NaN in the rows that do not count.
        scale = grad_losses if weight is None else torch.where(weight == 0, 0.0, weight * grad_losses)
        rows, _ = _rows_that_count(scale, max_rows)
        _, grad_hidden, grad_head = _by_chunks(
            hidden, head, target, scale, teacher, rows, chunk_rows, train_hidden, train_head, options
        )
        grad_losses = grad_losses.new_ones(())
    return tuple(
        hidden.new_empty(0) if grad is None else torch.mul(grad, grad_losses[..., None], out=torch.empty_like(like))
        for grad, like in ((grad_hidden, hidden), (grad_head, head))
    )


def _rows_that_count(weight: Tensor | None, max_rows: int | None) -> tuple[Tensor | None, Tensor | None]:
    """The indices of the rows to compute (None for all), and which rows that count are not among them (None if all
    are)."""
    if weight is None:
        return None, None
    counts = weight != 0
    if max_rows is None:
        rows = counts.nonzero()[:, 0]
        return (None if len(rows) == len(counts) else rows), None
    if max_rows >= weight.numel():
        return None, None
    rank = counts.cumsum(0)
    if weight.is_cpu and rank[-1] > max_rows:
        raise ValueError(f"{_OP}: {int(rank[-1])} rows count, more than max_rows = {max_rows}")
    # A stable sort puts the rows that count first; the kernel skips whatever follows them.
    return torch.argsort(~counts, stable=True)[:max_rows], counts & (rank > max_rows)


def _check_targets(target: Tensor, weight: Tensor | None, vocab: int) -> None:
    """Raises RuntimeError on the CPU. (The loss kernel would give the number of the row within its chunk.)"""
    if not target.is_cpu:
        return
    outside = (target < 0) | (target >= vocab)
    if weight is not None:
        outside &= weight != 0
    if outside.any():
        row = int(outside.nonzero()[0])
        raise RuntimeError(
            f"{_OP}: target {int(target[row])} of row {row} is outside the vocabulary [0, {vocab}); "
            "rows that do not count have a weight of 0 or the target ignore_index"
        )


def _by_chunks(hidden, head, target, weight, teacher, rows, chunk_rows, make_hidden, make_head, options):
    """(losses, nll, correct, entropy), each [T], and the gradients of the sum of losses (None for one not wanted)."""
    real = real_dtype(hidden)
    results = [hidden.new_zeros(target.shape, dtype=dtype) for dtype in (real, real, torch.bool, real)]
    grad_hidden = torch.zeros_like(hidden) if make_hidden else None
    grad_head = torch.zeros_like(head, dtype=real) if make_head else None
    # The operator whose name ends in an underscore turns the logits into their gradient in place.
    loss_of = _native.masked_cross_entropy_ if make_hidden or make_head else _native.masked_cross_entropy
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(len(hidden), rows, chunk_rows):
            # oneDNN's bfloat16 product also reads the memory between rows, from which NaN could reach the result.
            x = hidden[chunk].contiguous()
            if weight is not None:  # rows that do not count may hold NaN, and zero times NaN is NaN
                x = x.masked_fill((weight[chunk] == 0)[:, None], 0.0)
            logits = x @ head.T
            beside = (None if each is None else each[chunk][None] for each in (target, weight, teacher))
            for result, part in zip(results, loss_of(logits[None], *beside, *options), strict=False):
                result[chunk] = part[0]
            if make_hidden:
                grad_hidden[chunk] = logits @ head
            if make_head:
                _accumulate(grad_head, logits.T, x)
            del logits  # before the next chunk's
    return results, grad_hidden, grad_head


def _chunks(total: int, rows: Tensor | None, size: int) -> Iterator[slice | Tensor]:
    """The index of each chunk: a slice of all rows, or a piece of the given row numbers."""
    count = total if rows is None else len(rows)
    for start in range(0, count, size):
        span = slice(start, min(start + size, count))
        yield span if rows is None else rows[span]


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if a.dtype != total.dtype and a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# ------------------------------------------------------------------- registration


@_forward.register_fake
def _(hidden, head, target, weight, teacher, max_rows, chunk_rows, per_row, make_hidden, make_head, *options):
    real = real_dtype(hidden)
    return (
        hidden.new_empty(target.shape if per_row else (), dtype=real),
        *(hidden.new_empty(target.shape, dtype=dtype) for dtype in (real, torch.bool, real)),
        torch.empty_like(hidden) if make_hidden else hidden.new_empty(0),
        torch.empty_like(head, dtype=real) if make_head else hidden.new_empty(0),
    )


@_gradients.register_fake
def _(grad_losses, grad_hidden, grad_head, hidden, head, *others):
    train_hidden, train_head = others[5:7]
    return tuple(
        torch.empty_like(x) if train else hidden.new_empty(0)
        for x, train in ((hidden, train_hidden), (head, train_head))
    )


def _keep(ctx, inputs, output):
    *tensors, max_rows, chunk_rows, _, make_hidden, make_head = inputs[:10]
    ctx.sizes, ctx.options = (max_rows, chunk_rows), inputs[10:]
    _, *others, grad_hidden, grad_head = output
    ctx.mark_non_differentiable(*others, grad_hidden, grad_head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden if make_hidden else None, grad_head if make_head else None, *tensors)


def _backward(ctx, grad_losses, *_):
    if grad_losses is None:
        return (None,) * 15
    trained = ctx.needs_input_grad[:2]
    grads = _native.linear_cross_entropy_backward(grad_losses, *ctx.saved_tensors, *ctx.sizes, *trained, *ctx.options)
    return *(grad if train else None for grad, train in zip(grads, trained, strict=True)), *[None] * 13


_forward.register_autograd(_backward, setup_context=_keep)
refuse_second_derivative("linear_cross_entropy")
