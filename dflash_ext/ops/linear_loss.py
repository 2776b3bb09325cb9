"""Cross-entropy straight from hidden states and the vocabulary head, without the [T, V] logits."""

import torch
from torch import Tensor

from ..checks import check_numbers, check_tensors, has_integers, shown
from ..reference import CrossEntropy
from .autograd import refuse_forward_mode
from .backends import warn_of_portable_kernels
from .devices import autocast
from .linear_loss_ops import loss_of_rows, traced_loss_of_rows
from .loss import DTYPES, check_bounds, check_normaliser, check_rows, options_of, real_dtype, reduced, weight_of

_OP = "linear_cross_entropy"

# How many logits the loss kernel handles at a time. On a GPU these are enough rows for the matrix products to run at
# full speed.
_LOGITS_AT_A_TIME = {"cuda": 160 << 20, "cpu": 16 << 20}
# How many logits at most exist at a time if the head is trained, so that few products make its gradient.
_LOGITS_OF_A_TRAINED_HEAD = {"cuda": 2 << 30, "cpu": 256 << 20}


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
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_row: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_kind: str = "kl",
    teacher_mix: float = 0.0,
    chunk_rows: int | None = None,
) -> CrossEntropy:
    """``masked_cross_entropy`` of ``hidden @ head.T``, only for rows that count.

    It is composed of matrix products and the native loss kernel, which turns logits into their gradient in place.

    With a frozen head a chunk of logits exists at a time. The forward computes the gradient of ``hidden`` while the
    logits exist, and the backward only scales it.

    With a trainable head (``head.requires_grad``) the gradient of the logits of all rows that count is kept for the
    backward, ``[kept, V]`` in the dtype of ``hidden``, and the gradients of ``hidden`` and ``head`` are one matrix
    product each. If that is too much (see ``chunk_rows``), or if torch.compile cannot know the number of rows, which
    needs ``max_rows`` or neither weight nor ignore_index, the backward computes the logits again, chunk by chunk. The
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
        chunk_rows: rows of logits that exist at a time. None chooses by the size of the vocabulary. If the head is
            trained, that is as many rows as have 2^31 logits on a GPU and 2^28 on a CPU.
        ignore_index, reduction, normaliser, softcap, label_smoothing, z_loss, teacher, teacher_kind, teacher_mix: as
            in ``masked_cross_entropy``; ``teacher`` holds logits ``[..., V]``.
        teacher_hidden: in place of ``teacher``, the hidden states ``[..., G]`` that its logits are computed from, a
            chunk at a time, so that its distributions never exist in full. It gets no gradient.
        teacher_head: the teacher's head ``[V, G]``, of the dtype of ``teacher_hidden``. It may be ``head`` itself, and
            gets no gradient from the teacher.
        teacher_row: ``[...]`` integer, for each row of ``hidden`` the row of ``teacher_hidden`` (its leading dimensions
            flattened) that predicts the same token. None if the rows are the same. For a causal teacher and a label
            at position p it is the teacher's state at position p - 1 on the clean text. It is not read for rows that do
            not count. A row that does not exist is treated like a target outside the vocabulary.
        teacher_softcap: bound on the size of the logits that ``teacher_hidden`` gives; None for none.

    Returns:
        CrossEntropy as ``masked_cross_entropy`` does, in the order of the rows given, with zeros for rows of
        weight 0.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; on the CPU, more rows than
            ``max_rows``.
        TypeError: a tensor where a number is needed, since it would get no gradient.
        RuntimeError: a target outside the vocabulary (CPU); a second derivative.
    """
    given = teacher if teacher_hidden is None else teacher_hidden
    options = options_of(
        _OP, reduction, ignore_index, softcap, label_smoothing, z_loss, given, teacher_kind, teacher_mix
    )
    optional = {
        "weight": weight,
        "teacher": teacher,
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher_head,
        "teacher_row": teacher_row,
    }
    numbers = {"normaliser": normaliser}
    check_tensors(_OP, hidden=hidden, head=head, target=target, optional=optional, numbers=numbers)
    check_normaliser(_OP, normaliser, reduction)
    refuse_forward_mode(_OP, hidden, head)
    tensors = autocast(hidden, head, teacher, teacher_hidden, teacher_head)
    hidden, head, teacher, teacher_hidden, teacher_head = tensors
    _check(hidden, head, target, weight, teacher, max_rows, chunk_rows)
    _check_teacher(head, target, teacher, teacher_hidden, teacher_head, teacher_row, teacher_softcap)
    shape, vocab = target.shape, head.shape[0]
    given = teacher if teacher_hidden is None else teacher_hidden
    if not teacher_mix:
        given = teacher_head = teacher_row = None
    target = target.flatten().to(torch.int64)
    weight = None if weight is None else weight.flatten()
    weight = weight_of(target, weight, ignore_index, real_dtype(hidden))
    per_row = reduction == "none"
    train_hidden, train_head = (x.requires_grad and torch.is_grad_enabled() for x in (hidden, head))
    kind = "cuda" if hidden.is_cuda else "cpu"
    sized = (
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        target,
        weight,
        None if given is None else given.detach().reshape(-1, given.shape[-1]),
        None if teacher_head is None else teacher_head.detach(),
        None if teacher_row is None else teacher_row.flatten().to(torch.int64),
        max_rows,
        chunk_rows or _rows_of(_LOGITS_AT_A_TIME[kind], vocab),
        chunk_rows or _rows_of(_LOGITS_OF_A_TRAINED_HEAD[kind], vocab),
    )
    numbers = (float(teacher_softcap or 0.0), *options)
    if _is_traced(hidden):
        # The size of what is kept has to be known.
        keep = train_head and (weight is None or max_rows is not None)
        made = per_row, train_hidden and not train_head, keep
        losses, nll, correct, entropy, *_ = traced_loss_of_rows(*sized, *made, *numbers)
    else:
        losses, nll, correct, entropy = loss_of_rows(sized, numbers, per_row, train_hidden, train_head)
    warn_of_portable_kernels(hidden.device)
    loss = losses.view(shape) if per_row else reduced(losses, target, weight, reduction, normaliser)
    return CrossEntropy(loss, nll.view(shape), correct.view(shape), entropy.view(shape))


def _is_traced(x: Tensor) -> bool:
    """Whether torch.compile, torch.func or a tensor without numbers needs an operator that it can look through."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
    )


def _rows_of(logits: int, vocab: int) -> int:
    """How many rows have so many logits: a multiple of what the matrix products handle at a time."""
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
    check_bounds(_OP, max_rows=max_rows, chunk_rows=chunk_rows)


def _check_teacher(
    head: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    teacher_row: Tensor | None,
    teacher_softcap: float | None,
) -> None:
    """Raises ValueError unless the teacher is given as logits alone, or as hidden states with a head."""
    if teacher_hidden is None:
        for name, value in (
            ("teacher_head", teacher_head),
            ("teacher_row", teacher_row),
            ("teacher_softcap", teacher_softcap),
        ):
            if value is not None:
                raise ValueError(f"{_OP}: {name} is given without teacher_hidden")
        return
    check_numbers(_OP, teacher_softcap=teacher_softcap)
    if teacher is not None:
        raise ValueError(f"{_OP}: teacher and teacher_hidden are given; one of them is needed")
    if teacher_hidden.dim() == 0:
        raise ValueError(f"{_OP}: teacher_hidden is {shown(teacher_hidden)}; [..., G] is needed")
    shapes = [len(head), teacher_hidden.shape[-1]]
    if teacher_head is None or list(teacher_head.shape) != shapes or teacher_head.dtype != teacher_hidden.dtype:
        raise ValueError(
            f"{_OP}: teacher_head is {shown(teacher_head)}; with teacher_hidden {shown(teacher_hidden)} and a "
            f"vocabulary of {len(head)} it must be {teacher_hidden.dtype} {shapes}"
        )
    if teacher_hidden.dtype not in DTYPES:
        raise ValueError(f"{_OP}: teacher_hidden is {shown(teacher_hidden)}; floating point is needed")
    if teacher_hidden.numel() == 0 and target.numel() > 0:
        raise ValueError(f"{_OP}: teacher_hidden is {shown(teacher_hidden)}; at least one row is needed")
    if teacher_row is None:
        if teacher_hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"{_OP}: teacher_hidden is {shown(teacher_hidden)}; without teacher_row it has one row for each row of "
                f"hidden, {list(target.shape)}"
            )
    elif teacher_row.shape != target.shape or not has_integers(teacher_row):
        raise ValueError(f"{_OP}: teacher_row is {shown(teacher_row)}; integers {list(target.shape)} are needed")
    if teacher_softcap is not None and not 1e-30 < teacher_softcap < 1e30:
        raise ValueError(f"{_OP}: teacher_softcap is {teacher_softcap}; it must be positive, or None for none")
