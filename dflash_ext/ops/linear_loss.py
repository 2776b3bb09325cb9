"""Cross-entropy straight from hidden states and the vocabulary head, without the [T, V] logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import CrossEntropy
from .loss import options_of, real_dtype, reduce_losses

# Logits that exist at a time: on a GPU enough rows for the matrix products to run at full speed.
_LOGITS_AT_A_TIME = {"cuda": 160 << 20, "cpu": 16 << 20}


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    max_rows: int | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Tensor | None = None,
    teacher_kind: str = "kl",
    teacher_mix: float = 0.0,
    chunk_rows: int | None = None,
) -> CrossEntropy:
    """``masked_cross_entropy`` of ``hidden @ head.T``, a chunk of rows at a time, only for rows that count.

    It is composed of matrix products and the native loss kernel, which turns a chunk of logits into its
    gradient in place. With a frozen head (``head.requires_grad`` is False) the gradient of the hidden states
    is made in the forward, and the backward only scales it, row by row. With a trainable head the backward
    computes the logits again, and the head's gradient accumulates in float32.

    Args:
        hidden: ``[..., H]`` float32, bfloat16 or float16, on the CPU also float64.
        head: ``[V, H]`` of the same dtype. Under autocast both are cast to its dtype.
        target: ``[...]`` integer; see ``masked_cross_entropy``.
        weight: ``[...]``, or None for ones. Rows of weight 0 are left out of the matrix products.
        max_rows: a bound on the number of rows that count. Without it their number is read back from the
            device; with it nothing waits for the device, and ``max_rows`` rows are computed. If more rows
            count, it is an error on the CPU, and on CUDA (or compiled) the loss is NaN.
        chunk_rows: rows of logits that exist at a time; None chooses by the size of the vocabulary.
        reduction, softcap, label_smoothing, z_loss, teacher, teacher_kind, teacher_mix: as in
            ``masked_cross_entropy``; ``teacher`` holds logits ``[..., V]``.

    Returns:
        CrossEntropy as ``masked_cross_entropy`` does, in the order of the rows given, with zeros for rows of
        weight 0.

    Raises:
        ValueError: an argument of the wrong shape, dtype or range; on the CPU, more rows than ``max_rows``.
    """
    options = options_of(reduction, softcap, label_smoothing, z_loss, teacher, teacher_kind, teacher_mix)
    _check(hidden, head, target, weight, teacher, max_rows, chunk_rows)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
        teacher = None if teacher is None else teacher.to(dtype)
    shape, vocab = target.shape, head.shape[0]
    weight = None if weight is None else weight.to(real_dtype(hidden)).flatten()
    rows, overflow = _rows_that_count(weight, max_rows)
    losses, nll, correct, entropy = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        target.flatten().to(torch.int64),
        weight,
        None if teacher is None else teacher.detach().reshape(-1, vocab),
        rows,
        chunk_rows or _rows_at_a_time(hidden.device, vocab),
        options,
    )
    if overflow is not None:
        losses = losses.masked_fill(overflow, torch.nan)
    loss = reduce_losses(losses.view(shape), weight, reduction)
    return CrossEntropy(loss, nll.view(shape), correct.view(shape), entropy.view(shape))


def _rows_at_a_time(device: torch.device, vocab: int) -> int:
    """A multiple of what the matrix products handle at a time."""
    return max(256, _LOGITS_AT_A_TIME[device.type] // vocab // 256 * 256)


def _rows_that_count(weight: Tensor | None, max_rows: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the rows to compute (None: all), and which rows they miss (None: they cannot miss any)."""
    if weight is None:
        return None, None
    counts = weight != 0
    if max_rows is None:
        return counts.nonzero()[:, 0], None
    if max_rows >= weight.numel():
        return None, None
    rank = counts.cumsum(0)
    on_host = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and rank[-1] > max_rows:
        raise ValueError(f"linear_cross_entropy: {int(rank[-1])} rows count, more than max_rows = {max_rows}")
    # A stable sort puts the rows that count first; the kernel skips whatever follows them.
    return torch.argsort(~counts, stable=True)[:max_rows], counts & (rank > max_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """(losses, nll, correct, entropy), each [T], of hidden [T, H]; only ``losses`` has a gradient."""

    @staticmethod
    def forward(ctx, hidden, head, target, weight, teacher, rows, chunk_rows, options):
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        real = real_dtype(hidden)
        outputs = [hidden.new_zeros(target.shape, dtype=dtype) for dtype in (real, real, torch.bool, real)]
        # With a frozen head the gradient of the hidden states is made while the logits are there.
        grad_hidden = torch.zeros_like(hidden) if needs_hidden and not needs_head else None
        for chunk in _chunks(len(hidden), rows, chunk_rows):
            logits = hidden[chunk] @ head.T
            results = _loss_in_place(logits, chunk, target, weight, teacher, options)
            for output, result in zip(outputs, results, strict=True):
                output[chunk] = result[0]
            if grad_hidden is not None:
                grad_hidden[chunk] = logits @ head
            del logits  # before the next chunk's
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(hidden, head, target, weight, teacher, rows, grad_hidden)
        ctx.chunk_rows, ctx.options = chunk_rows, options
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_losses, *_):
        hidden, head, target, weight, teacher, rows, grad_hidden = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        if not needs_head:
            scaled = torch.mul(grad_hidden, grad_losses[:, None], out=torch.empty_like(grad_hidden))
            return scaled, *[None] * 7

        real = real_dtype(hidden)
        # Where a gradient overflowed, 0 * inf must not reach the rows that do not count.
        weight = torch.ones_like(grad_losses) if weight is None else weight
        scale = torch.where(weight == 0, 0.0, weight * grad_losses)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=real)
        for chunk in _chunks(len(hidden), rows, ctx.chunk_rows):
            x = hidden[chunk]
            grad_logits = x @ head.T
            _loss_in_place(grad_logits, chunk, target, scale, teacher, ctx.options)
            if needs_hidden:
                grad_hidden[chunk] = grad_logits @ head
            grad_head += _matmul(grad_logits.T, x, real)
            del grad_logits
        return grad_hidden, grad_head.to(head.dtype), *[None] * 6


def _chunks(total: int, rows: Tensor | None, size: int) -> Iterator[slice | Tensor]:
    """What to index with, chunk after chunk: slices of all rows, or pieces of the given row numbers."""
    count = total if rows is None else len(rows)
    for start in range(0, count, size):
        span = slice(start, min(start + size, count))
        yield span if rows is None else rows[span]


def _loss_in_place(logits, chunk, target, weight, teacher, options):
    """Turns logits [n, V] into d(weight * loss)/d(logits); returns losses, nll, correct, entropy: [1, n]."""
    target = target[chunk][None]
    weight, teacher = (None if each is None else each[chunk][None] for each in (weight, teacher))
    return torch.ops.dflash_ext.masked_cross_entropy_(logits[None], target, weight, teacher, *options)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in dtype."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def _check(hidden, head, target, weight, teacher, max_rows, chunk_rows) -> None:
    shape = hidden.shape[:-1]
    if head.dim() != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, head is {list(head.shape)}; [..., H] and [V, H] are needed"
        )
    if hidden.dtype != head.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden is {hidden.dtype}, head is {head.dtype}; they must be the same")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target is {target.dtype}; an integer dtype is needed")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; one entry per row of hidden is {list(shape)}"
            )
    if teacher is not None and teacher.shape != (*shape, len(head)):
        raise ValueError(f"teacher has shape {list(teacher.shape)}; it must be {[*shape, len(head)]}")
    if weight is not None and weight.requires_grad:
        raise ValueError("weight requires a gradient; only hidden and head get one: detach it")
    for name, bound in (("max_rows", max_rows), ("chunk_rows", chunk_rows)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} is {bound}; it must be at least 1")
