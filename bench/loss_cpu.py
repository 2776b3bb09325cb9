"""linear_cross_entropy on the CPU against torch on the selected rows: ``python -m bench.loss_cpu``."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runner
from bench.timing import cpu_turns
from dflash_ext import linear_cross_entropy

Results = tuple[Tensor, ...]  # the loss, then the gradients of what is trained


def data(rows: int, width: int, vocab: int, dtype: torch.dtype, train_head: bool) -> tuple[Tensor, ...]:
    """Makes hidden, head, target and weight. The weight is 1 for a quarter of the rows, and 0 for the others."""
    torch.manual_seed(0)
    hidden = torch.empty(rows, width, dtype=dtype).normal_().requires_grad_()
    head = torch.empty(vocab, width, dtype=dtype).normal_(std=3 * width**-0.5).requires_grad_(train_head)
    weight = torch.zeros(rows)
    weight[torch.randperm(rows)[: rows // 4]] = 1.0
    return hidden, head, torch.randint(0, vocab, (rows,)), weight


def ours(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Results:
    return with_gradients(linear_cross_entropy(hidden, head, target, weight).loss, hidden, head)


def torchs(hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Results:
    rows = weight.nonzero()[:, 0]
    logits = F.linear(hidden.index_select(0, rows), head)
    return with_gradients(F.cross_entropy(logits, target[rows]), hidden, head)


def with_gradients(loss: Tensor, *leaves: Tensor) -> Results:
    return loss.detach(), *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])


IMPLEMENTATIONS: dict[str, Callable[..., Results]] = {"dflash_ext": ours, "torch": torchs}


def peak_mib(impl: str, threads: int, *case) -> float:
    """The memory that a call, gradients included, needs in addition to its inputs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_rise_mib, (impl, threads, *case))


def _rise_mib(impl: str, threads: int, *case) -> float:
    torch.set_num_threads(threads)
    rows, width, vocab, *rest = case
    IMPLEMENTATIONS[impl](*data(rows, 8, 64, *rest))  # what libraries allocate once
    inputs = data(*case)
    before = _peak_kib()
    IMPLEMENTATIONS[impl](*inputs)
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """The peak memory of this process. (getrusage would include the parent's memory at the time of the fork.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def largest_error(got: Results, want: Results) -> float:
    """The largest error of all results, each relative to the largest number of the exact result."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))


def measured(rows: int, width: int, vocab: int, dtype: torch.dtype, train_head: bool) -> list[dict]:
    case = (rows, width, vocab, dtype, train_head)
    hidden, head, target, weight = data(*case)
    wide = (x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, head))
    want = torchs(*wide, target, weight)
    functions = {impl: lambda f=f: f(hidden, head, target, weight) for impl, f in IMPLEMENTATIONS.items()}
    errors = {impl: largest_error(function(), want) for impl, function in functions.items()}
    timings = cpu_turns(functions, seconds=20.0)
    ms = {impl: timing.ms for impl, timing in timings.items()}
    peaks = {impl: peak_mib(impl, torch.get_num_threads(), *case) for impl in functions}
    name = f"T{rows} H{width} V{vocab} {str(dtype).split('.')[1]}, {'trainable' if train_head else 'frozen'} head"
    print(
        f"{name}: {ms['dflash_ext']:.0f} ms, torch {ms['torch']:.0f} ms, {ms['dflash_ext'] / ms['torch']:.2f}x; "
        f"{peaks['dflash_ext']:.0f} MiB, torch {peaks['torch']:.0f} MiB, {peaks['dflash_ext'] / peaks['torch']:.2f}x"
    )
    return [
        {"case": f"{name}, 25% kept", "impl": impl, "pass": "forward+backward", **timings[impl].row()}
        | {"max_err": errors[impl], "peak_mib": peaks[impl]}
        for impl in functions
    ]


def main() -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for train_head in (False, True):
            rows += measured(2048, 576, 49152, dtype, train_head)
    print(runner.write("loss_cpu", rows))


if __name__ == "__main__":
    main()
