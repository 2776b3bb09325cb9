"""Cross-entropy under a vocabulary head whose rows are spread over the processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_tensors, shown
from ..reference import CrossEntropy
from ..reference.numerics import softcapped
from .autograd import first_derivatives, refuse_forward_mode
from .devices import autocast
from .linear_loss_ops import rows_of, rows_outside, rows_that_count
from .loss import DTYPES, check_bounds, check_normaliser, check_rows, options_of, real_dtype, reduced, weight_of

_native = torch.ops.dflash_ext
_OP = "sharded_linear_cross_entropy"


def sharded_linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    max_rows: int | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normaliser: float | Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """``linear_cross_entropy`` with a head of ``[V, H]`` of which each of n processes holds ``[V / n, H]``.

    The processes call it together and give the same hidden states, targets and weights. All get the same results and
    the same gradient of ``hidden``, and each gets the gradient of its own part of the head. A process holds
    ``[kept, V / n]`` logits. The forward exchanges six numbers a row, and the backward sums the gradient of the rows
    of ``hidden`` that count, in float32. torch.compile leaves this exchange outside of its graphs.

    Args:
        hidden: ``[..., H]``, as in ``linear_cross_entropy``.
        head: ``[V / n, H]``, the rows ``[rank * V / n, (rank + 1) * V / n)`` of the head, rank being this process's
            place in the group. All processes hold equally many.
        target: ``[...]`` integer, tokens of the whole vocabulary.
        group: the processes; None for all.
        weight, max_rows, ignore_index, reduction, normaliser, softcap, label_smoothing, z_loss: as in
            ``linear_cross_entropy``.

    Returns:
        CrossEntropy as ``linear_cross_entropy`` does.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range; on the CPU, more rows than ``max_rows``.
        TypeError: a tensor where a number is needed, since it would get no gradient.
        RuntimeError: a target outside the vocabulary (CPU; on CUDA its row is NaN); a second derivative.
    """
    options = options_of(_OP, reduction, ignore_index, softcap, label_smoothing, z_loss, None, "kl", 0.0)
    given = {"optional": {"weight": weight}, "numbers": {"normaliser": normaliser}}
    check_tensors(_OP, hidden=hidden, head=head, target=target, **given)
    check_normaliser(_OP, normaliser, reduction)
    refuse_forward_mode(_OP, hidden, head)
    hidden, head = autocast(hidden, head)
    if hidden.dim() == 0 or head.dim() != 2 or hidden.shape[-1] != head.shape[1] or len(head) == 0:
        raise ValueError(f"{_OP}: hidden is {shown(hidden)}, head is {shown(head)}; [..., H] and [V / n, H] are needed")
    if hidden.dtype not in DTYPES or hidden.dtype != head.dtype:
        raise ValueError(f"{_OP}: hidden is {shown(hidden)}, head is {shown(head)}; one floating dtype is needed")
    check_rows(_OP, "hidden", hidden.shape[:-1], target, weight)
    check_bounds(_OP, max_rows=max_rows)
    shape = target.shape
    target = target.flatten().to(torch.int64)
    weight = weight_of(target, None if weight is None else weight.flatten(), ignore_index, real_dtype(hidden))
    flat = hidden.reshape(-1, hidden.shape[-1])
    # As a decorator, `disable` would import the compiler with this package.
    exchange = torch.compiler.disable(_ShardedLoss.apply) if torch.compiler.is_compiling() else _ShardedLoss.apply
    with torch.autocast(hidden.device.type, enabled=False):
        losses, *others = exchange(flat, head, target, weight, max_rows, group, options)
    nll, correct, entropy = (each.view(shape) for each in others)
    per_row = reduction == "none"
    loss = losses.view(shape) if per_row else reduced(losses.sum(), target, weight, reduction, normaliser)
    return CrossEntropy(loss, nll, correct, entropy)


class _ShardedLoss(torch.autograd.Function):
    """The losses of hidden [T, H], which alone have a gradient, then nll, correct and entropy, each [T]."""

    @staticmethod
    def forward(ctx, hidden, head, target, weight, max_rows, group, options):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        vocab = size * len(head)
        # On CUDA, a target outside the vocabulary becomes one that no process holds, so that its row is NaN.
        target = target.masked_fill(rows_outside(_OP, weight, target, vocab), vocab)
        rows, overflow = rows_that_count(_OP, len(hidden), weight, max_rows)
        rows = slice(None) if rows is None else rows
        x, target = rows_of(hidden, weight, rows), target[rows]
        scale = target.new_ones(target.shape, dtype=real_dtype(hidden)) if weight is None else weight[rows]
        logits = x @ head.T

        # Where another process holds the target, index 0 stands for it, and what depends on the target is not used.
        local = target - rank * len(head)
        holds = (local >= 0) & (local < len(head))
        place = local.where(holds, 0)[:, None]
        raw = logits.gather(1, place)[:, 0].to(scale.dtype)
        z = softcapped(raw, options.softcap)
        parts = _exchanged(_local_parts(logits, place[:, 0], z, holds, options), group)
        sums = _Sums(parts, target, len(head))
        losses = scale * sums.loss(options)

        results = [hidden.new_zeros(len(hidden), dtype=dtype) for dtype in (scale.dtype, scale.dtype, torch.bool)]
        results.append(torch.zeros_like(results[0]))
        counts = scale != 0
        for result, part in zip(results, (losses, sums.nll, sums.correct, sums.entropy), strict=True):
            result[rows] = part.masked_fill(~counts, 0)
        if overflow is not None:
            results[0].masked_fill_(overflow, torch.nan)

        if any(ctx.needs_input_grad):
            ctx.group, ctx.rows = group, rows
            grad = _gradient_of_logits(logits, place[:, 0], scale, sums, options, size)
            # The kernel cannot know whether this process holds the target, so that its logit's gradient is made here.
            p = torch.exp(z - sums.max) / sums.total
            of_target = p * (1 + 2 * options.z_loss * sums.lse) - options.label_smoothing / vocab
            of_target = scale * (of_target - (1 - options.label_smoothing) * holds)
            if options.softcap:
                of_target = of_target * (1 - (z / options.softcap).square())
            grad.scatter_(1, place, of_target.where(counts, 0).to(grad.dtype)[:, None])
            ctx.save_for_backward(hidden, head, weight, grad)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_losses, *_):
        hidden, head, weight, grad = ctx.saved_tensors
        grad_hidden = grad_head = None
        with torch.no_grad():
            if weight is not None:  # if a gradient overflowed, 0 * inf would be NaN in the rows that do not count
                grad_losses = grad_losses.masked_fill(weight == 0, 0.0)
            scale = grad_losses[ctx.rows, None]
            if ctx.needs_input_grad[0]:
                part = (grad @ head).to(scale.dtype)
                dist.all_reduce(part, group=ctx.group)
                grad_hidden = torch.zeros_like(hidden)
                grad_hidden[ctx.rows] = part.mul_(scale).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grad_head = grad.T @ rows_of(hidden, weight, ctx.rows).mul_(scale)
        return *first_derivatives(_OP, (grad_hidden, grad_head), (hidden, head)), *[None] * 5


def _local_parts(logits: Tensor, place: Tensor, z: Tensor, holds: Tensor, options) -> Tensor:
    """``[6, K]``, of this process's part of each row: the maximum, the sum of exp(z - maximum), the entropy, the mean
    of z, the target's z (0 if another process holds it), and whether it is the first maximum."""
    # With a label smoothing of 1 the loss is logsumexp(z) - mean(z).
    smoothing = 1.0 if options.label_smoothing else 0.0
    forward = _native.masked_cross_entropy(
        logits[None], place[None], None, None, 0, 0.0, options.softcap, smoothing, 0.0
    )
    losses, _, correct, entropy, stats = (each[0] for each in forward)
    largest, total = stats[:, 0], 1 / stats[:, 1]
    mean = largest + torch.log(total) - losses
    return torch.stack([largest, total, entropy, mean, z.where(holds, 0), (correct & holds).to(z.dtype)])


def _exchanged(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[n, ...]``, the parts of all processes."""
    every = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, parts, group=group)
    return torch.stack(every)


class _Sums:
    """What is known of whole rows once the parts of all processes are."""

    def __init__(self, parts: Tensor, target: Tensor, shard: int):
        largest, total, entropy, mean, z, is_first = parts.unbind(1)
        owner = target // shard
        self.max = largest.amax(0)
        shares = torch.exp(largest - self.max) * total
        self.total = shares.sum(0)
        shares = shares / self.total
        self.lse = self.max + torch.log(self.total)
        self.nll = torch.log(self.total) - (z.sum(0) - self.max)
        self.nll = self.nll.masked_fill((owner < 0) | (owner >= len(parts)), torch.nan)
        self.entropy = torch.where(shares > 0, shares * (entropy - torch.log(shares)), 0.0).sum(0)
        self.mean = mean.mean(0)
        self.correct = (is_first.sum(0) > 0) & (largest.argmax(0) == owner)

    def loss(self, options) -> Tensor:
        row = self.nll
        if options.label_smoothing:
            row = (1 - options.label_smoothing) * row + options.label_smoothing * (self.lse - self.mean)
        return row + options.z_loss * self.lse.square() if options.z_loss else row


def _gradient_of_logits(logits: Tensor, place: Tensor, scale: Tensor, sums: _Sums, options, size: int) -> Tensor:
    """The gradient of ``scale * loss``, right everywhere but at ``place``."""
    nothing = torch.zeros_like(sums.max)
    stats = torch.stack([sums.max, 1 / sums.total, nothing, nothing, nothing], -1)
    # The kernel divides the smoothing by the number of logits that it sees.
    smoothing = options.label_smoothing / size
    grad_losses = torch.ones_like(scale).masked_fill(sums.nll.isnan(), torch.nan)
    return _native.masked_cross_entropy_backward(
        grad_losses[None], logits[None], place[None], scale[None].contiguous(), None, stats[None],
        0, 0.0, options.softcap, smoothing, options.z_loss,
    )[0]  # fmt: skip
