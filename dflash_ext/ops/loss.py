"""Cross-entropy where it counts: per-row weights, softcap, label smoothing, z-loss and a teacher."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_numbers, check_tensors, has_integers, is_int, shown
from ..native import load
from ..reference import CrossEntropy
from .autograd import differentiable, differentiable_once, refuse_forward_mode
from .devices import autocast_dtype

load()
_native = torch.ops.dflash_ext
_OP = "masked_cross_entropy"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEACHER_KINDS = ("kl", "tv")
REDUCTIONS = ("mean", "sum", "none")


OPTIONS_SCHEMA = "int teacher_kind, float teacher_mix, float softcap, float label_smoothing, float z_loss"


class _Options(NamedTuple):
    """The operators' trailing arguments, in the order of OPTIONS_SCHEMA."""

    teacher_kind: int
    teacher_mix: float
    softcap: float
    label_smoothing: float
    z_loss: float


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normaliser: float | Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Tensor | None = None,
    teacher_kind: str = "kl",
    teacher_mix: float = 0.0,
) -> CrossEntropy:
    """Weighted cross-entropy of each row of logits, and what training wants to know beside the loss.

    With ``z = softcap * tanh(logits / softcap)`` (or ``z = logits`` without a softcap), ``p = softmax(z)`` and
    ``t = softmax(teacher)``::

        row = (1 - teacher_mix) * ((1 - label_smoothing) * -log p[target] + label_smoothing * mean(-log p))
              + z_loss * logsumexp(z) ** 2
              + teacher_mix * distance(t, p)

    Rows of weight 0, and rows whose target is ``ignore_index``, are skipped: their logits are not read, and their
    outputs and gradients are 0. A row of weight 0 may hold any target. The forward reads the logits once (twice with
    ``teacher_kind="tv"``), the backward reads them once and writes their gradient once. Sums are in float32, in
    float64 for float64 logits.

    Args:
        logits: ``[..., V]`` float32, bfloat16 or float16, on the CPU also float64; any strides as long as the
            last dimension is contiguous.
        target: ``[...]`` integer. A row that counts needs a target in ``[0, V)``. Another one raises on the CPU. On
            CUDA, where the check would have to wait for the GPU, it makes that row's loss, nll and gradient NaN.
        weight: ``[...]``, or None for ones everywhere.
        ignore_index: the target of rows that do not count, whatever their weight; None if there is no such target.
        reduction: ``"mean"`` is ``sum(weight * row) / normaliser``, ``"sum"`` is ``sum(weight * row)``, and
            ``"none"`` is ``weight * row`` per row.
        normaliser: what ``"mean"`` divides by, a number or a tensor of one element without gradient. None is the sum
            of the weights of the rows that count. 0 counts as 1, so that the loss of a batch without tokens is 0.
            Under data parallelism the caller sums it over the ranks.
        softcap: bound on the logits' size (Gemma 2); None for none.
        label_smoothing: share of the target's mass that is spread evenly over the vocabulary.
        z_loss: weight of ``logsumexp ** 2``, which keeps the normaliser near 1 (PaLM).
        teacher: logits of the teacher, of the same shape, dtype and device; not softcapped. Under autocast it
            is cast to the logits' dtype.
        teacher_kind: ``"kl"`` for KL(t || p), ``"tv"`` for total variation, half of ``sum |t - p|``: one
            minus the rate at which speculative sampling accepts a draft.
        teacher_mix: share of the teacher's term.

    Masked diffusion (LLaDA, arXiv 2502.09992; BD3-LM, arXiv 2503.09573) weighs a masked token by 1/t, t being the
    share that was masked, and divides by the number of tokens. Dividing by the sum of the weights would be another
    objective::

        weight = masked / t  # masked: bool [B, L]; t: [B, 1]
        masked_cross_entropy(logits, target, weight, normaliser=target.numel()).loss

    Returns:
        CrossEntropy(loss, nll, correct, entropy). Only ``loss`` carries a gradient, and only to the logits.
        ``nll`` and ``entropy`` (of p, in nats) are float32 or float64, ``correct`` says whether the argmax
        (the first, if there are several) is the target.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.
        TypeError: a tensor where a number is needed, since it would get no gradient.
        RuntimeError: a target outside the vocabulary (CPU); a second derivative.
    """
    options = options_of(
        _OP, reduction, ignore_index, softcap, label_smoothing, z_loss, teacher, teacher_kind, teacher_mix
    )
    optional = {"weight": weight, "teacher": teacher}
    check_tensors(_OP, logits=logits, target=target, optional=optional, numbers={"normaliser": normaliser})
    check_normaliser(_OP, normaliser, reduction)
    refuse_forward_mode(_OP, logits)
    if teacher is not None and teacher.is_floating_point() and autocast_dtype(logits.device):
        teacher = teacher.to(logits.dtype)
    _check(logits, target, weight, teacher)
    shape = logits.shape[:-1]
    logits = _as_3d(logits)
    rows = logits.shape[:2]
    target = target.to(torch.int64).reshape(rows).contiguous()
    weight = None if weight is None else weight.reshape(rows)
    weight = weight_of(target, weight, ignore_index, real_dtype(logits))
    losses, nll, correct, entropy, _ = _losses(
        logits,
        target,
        weight,
        None if teacher is None else _as_3d(teacher.detach()),
        *options,
    )
    loss = losses.view(shape) if reduction == "none" else reduced(losses.sum(), target, weight, reduction, normaliser)
    return CrossEntropy(loss, nll.view(shape), correct.view(shape), entropy.view(shape))


def real_dtype(logits: Tensor) -> torch.dtype:
    """The precision of sums and of everything per row."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _as_3d(logits: Tensor) -> Tensor:
    """[outer, inner, V] without a copy wherever the strides allow it."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{_OP}: the last dimension must be contiguous, its stride is {logits.stride(-1)}")
    if logits.dim() < 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.flatten(0, -3)


def weight_of(target: Tensor, weight: Tensor | None, ignore_index: int | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous weights of the rows, 0 where the target is ``ignore_index``; None if every row has weight 1."""
    if ignore_index is None:
        return None if weight is None else weight.to(dtype).contiguous()
    counts = target != ignore_index
    return counts.to(dtype) if weight is None else torch.where(counts, weight.to(dtype), 0.0)


def reduced(
    total: Tensor, target: Tensor, weight: Tensor | None, reduction: str, normaliser: float | Tensor | None
) -> Tensor:
    """The sum or the mean, from the sum of losses that are already multiplied by their weights."""
    if reduction == "sum":
        return total
    if normaliser is None:
        normaliser = target.numel() if weight is None else weight.sum()
    if not isinstance(normaliser, Tensor):
        return total / (normaliser or 1)
    normaliser = normaliser.to(total.dtype).reshape(())
    return total / torch.where(normaliser == 0, 1.0, normaliser)


def check_bounds(op: str, **bounds: int | None) -> None:
    """Raises TypeError or ValueError for a bound on a number of rows that is neither None nor an integer above 0."""
    for name, bound in bounds.items():
        if isinstance(bound, Tensor) or not (bound is None or is_int(bound)):
            raise TypeError(f"{op}: {name} is {shown(bound)}; an integer or None is needed")
        if bound is not None and bound < 1:
            raise ValueError(f"{op}: {name} is {bound}; it must be at least 1")


def options_of(
    op: str,
    reduction: str,
    ignore_index: int | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    teacher: Tensor | None,
    teacher_kind: str,
    teacher_mix: float,
) -> _Options:
    """Checks the options that both losses have, and converts them to the native operators' arguments."""
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "teacher_mix": teacher_mix}
    check_numbers(op, needed=numbers, softcap=softcap)
    if not (ignore_index is None or is_int(ignore_index)):
        raise TypeError(f"{op}: ignore_index is {shown(ignore_index)}; an integer or None is needed")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; 'mean', 'sum' and 'none' are supported")
    if teacher_kind not in TEACHER_KINDS:
        raise ValueError(f"{op}: teacher_kind is {teacher_kind!r}; 'kl' and 'tv' are supported")
    if softcap is not None and not 1e-30 < softcap < 1e30:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive, or None for none")
    for name in ("label_smoothing", "teacher_mix"):
        if not 0 <= numbers[name] <= 1:
            raise ValueError(f"{op}: {name} is {numbers[name]}; it must be between 0 and 1")
    if not -math.inf < z_loss < math.inf:  # Dynamo cannot trace math.isfinite of a number that varies
        raise ValueError(f"{op}: z_loss is {z_loss}; a finite number is needed")
    if teacher is None and teacher_mix:
        raise ValueError(f"{op}: teacher_mix is {teacher_mix}, but no teacher is given")
    kind = TEACHER_KINDS.index(teacher_kind)
    return _Options(kind, *map(float, (teacher_mix, softcap or 0.0, label_smoothing, z_loss)))


def check_normaliser(op: str, normaliser: float | Tensor | None, reduction: str) -> None:
    """Raises ValueError for a normaliser that cannot be used, or that the reduction does not use."""
    if normaliser is None:
        return
    if reduction != "mean":
        raise ValueError(f"{op}: normaliser is given with reduction {reduction!r}; only 'mean' divides by it")
    if isinstance(normaliser, Tensor):
        if normaliser.numel() != 1 or normaliser.requires_grad:
            raise ValueError(
                f"{op}: normaliser is {shown(normaliser)}; a tensor of one element without gradient is needed"
            )
    elif not 0 <= normaliser < math.inf:
        raise ValueError(f"{op}: normaliser is {normaliser}; a finite number of at least 0 is needed")


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, teacher: Tensor | None) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.dtype not in DTYPES:
        raise ValueError(
            f"{_OP}: logits is {shown(logits)}; float32, bfloat16, float16 or float64 [..., V], V > 0, is needed"
        )
    check_rows(_OP, "logits", logits.shape[:-1], target, weight)
    if teacher is not None and (teacher.shape, teacher.dtype) != (logits.shape, logits.dtype):
        raise ValueError(f"{_OP}: teacher is {shown(teacher)}; it must be like the logits, {shown(logits)}")


def check_rows(op: str, what: str, shape: torch.Size, target: Tensor, weight: Tensor | None) -> None:
    """Raises ValueError unless target (integers) and weight (without a gradient) have one entry per row of ``what``."""
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}; one entry per row of {what} is {list(shape)}"
            )
    if not has_integers(target):
        raise ValueError(f"{op}: target is {target.dtype}; token ids are integers")
    if weight is not None and weight.is_complex():
        raise ValueError(f"{op}: weight is {weight.dtype}; real numbers are needed")
    if weight is not None and weight.requires_grad:
        raise ValueError(f"{op}: weight requires a gradient, but gets none: detach it")


# ------------------------------------------------------------------- registration


def _fake_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = real_dtype(logits)
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for dtype in (real, real, torch.bool, real))


@torch.library.register_fake("dflash_ext::masked_cross_entropy")
def _(logits, target, weight, teacher, *options):
    rows = _fake_rows(logits)
    return *rows, rows[0].new_empty(*rows[0].shape, 5)


@torch.library.register_fake("dflash_ext::masked_cross_entropy_")
def _(logits, target, weight, teacher, *options):
    return _fake_rows(logits)


@torch.library.register_fake("dflash_ext::masked_cross_entropy_backward")
def _(grad_losses, logits, target, weight, teacher, stats, *options):
    return logits.new_empty(logits.shape)


def _keep(ctx, inputs, output):
    logits, target, weight, teacher, *ctx.options = inputs
    _, nll, correct, entropy, stats = output
    ctx.mark_non_differentiable(nll, correct, entropy, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, teacher, stats)


def _backward(ctx, grad_losses, *_):
    if grad_losses is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    grad = _losses_backward(grad_losses.contiguous(), *saved, *ctx.options)
    return grad, *[None] * 8


_losses_backward = differentiable_once("masked_cross_entropy")
_losses = differentiable("masked_cross_entropy", _keep, _backward)
