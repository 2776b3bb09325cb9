"""The losses on a GPU against bare matrix products and against other libraries: ``python -m bench.loss``.

Every implementation of linear_cross_entropy runs forward and backward on the same rows. Rows of given logits follow,
where "in place" is the pass that linear_cross_entropy uses: it turns logits into gradients, reads them once and writes
them once. These are the bytes of the rate of all implementations. Liger and cut-cross-entropy take part where they are
installed. The peak of memory is what a call needs in addition to weights and inputs, the gradients included.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runner
from bench.memory import peak_bytes
from bench.timing import gpu_turns
from dflash_ext import linear_cross_entropy, masked_cross_entropy

KL_SHARE = 0.5


class Case(NamedTuple):
    rows: int
    width: int
    vocab: int
    kept: float  # the share of rows that count
    train_head: bool
    teacher: bool = False  # half of the loss is the KL divergence to the distribution of a teacher's hidden states

    def __str__(self) -> str:
        head = "trainable head" if self.train_head else "frozen head"
        teacher = ", KL to hidden states" if self.teacher else ""
        return f"T{self.rows} H{self.width} V{self.vocab}, {self.kept:.0%} kept, {head}{teacher}"


CASES = (
    Case(8192, 4096, 151936, 1.0, True),
    Case(8192, 4096, 151936, 0.25, True),
    Case(2048, 2304, 262144, 0.25, True),
    Case(8192, 4096, 151936, 1.0, False),
    Case(8192, 4096, 151936, 0.25, False),
    Case(2048, 2304, 262144, 0.25, False),
    Case(8192, 4096, 151936, 0.25, True, teacher=True),
    Case(8192, 4096, 151936, 0.25, False, teacher=True),
)


class Inputs(NamedTuple):
    hidden: Tensor
    head: Tensor
    labels: Tensor  # -100 for rows that do not count
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None

    def double(self) -> "Inputs":
        """The same in float64, as leaves of their own."""
        return Inputs(*(_leaf(x.detach().double(), x) if _is_real(x) else x for x in self))

    def trained(self) -> list[Tensor]:
        return [x for x in self if _is_real(x) and x.requires_grad]


def _is_real(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _leaf(x: Tensor, like: Tensor) -> Tensor:
    return x.requires_grad_(like.requires_grad)


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    hidden = make(case.rows, case.width).requires_grad_()
    head = make(case.vocab, case.width).mul_(3 * case.width**-0.5).requires_grad_(case.train_head)
    labels = torch.randint(0, case.vocab, (case.rows,), device="cuda")
    labels[torch.randperm(case.rows, device="cuda")[int(case.kept * case.rows) :]] = -100
    if not case.teacher:
        return Inputs(hidden, head, labels, None, None)
    teacher_head = make(case.vocab, case.width).mul_(3 * case.width**-0.5)
    return Inputs(hidden, head, labels, make(case.rows, case.width), teacher_head)


# ---- the implementations: each returns the loss -----------------------------------------------------------


def ours(data: Inputs) -> Tensor:
    options = {}
    if data.teacher_hidden is not None:
        options = {"teacher_hidden": data.teacher_hidden, "teacher_head": data.teacher_head, "teacher_mix": KL_SHARE}
    return linear_cross_entropy(data.hidden, data.head, data.labels, **options).loss


def torchs(data: Inputs) -> Tensor:
    """As one writes it who knows that only the selected rows need logits."""
    rows = (data.labels != -100).nonzero()[:, 0]
    return _of_selected(data.hidden[rows], data.head, data.labels[rows], data, rows)


def _of_selected(hidden: Tensor, head: Tensor, labels: Tensor, data: Inputs, rows: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    loss = F.cross_entropy(logits, labels)
    if data.teacher_hidden is None:
        return loss
    teacher = F.linear(data.teacher_hidden[rows], data.teacher_head).log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
    return (1 - KL_SHARE) * loss + KL_SHARE * kl


def compiled(data: Inputs) -> Tensor:
    rows = (data.labels != -100).nonzero()[:, 0]
    return _compiled()(data.hidden[rows], data.head, data.labels[rows], data, rows)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_of_selected)


def liger(data: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(data.head, data.hidden, data.labels)


def cut_cross_entropy(data: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cce

    return cce(data.hidden, data.head, data.labels)


IMPLEMENTATIONS = {
    "dflash_ext": ours,
    "torch": torchs,
    "torch.compile": compiled,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
MODULES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def implementations(case: Case, chosen: list[str]) -> dict[str, Callable[[Inputs], Tensor]]:
    """Those that are installed and have the case's loss."""

    def takes_part(name: str) -> bool:
        return name in chosen and (
            name not in MODULES or (not case.teacher and importlib.util.find_spec(MODULES[name]) is not None)
        )

    return {name: function for name, function in IMPLEMENTATIONS.items() if takes_part(name)}


def products(case: Case) -> Callable[[], None]:
    """The matrix products that no implementation can do without, and nothing else."""
    kept, make = int(case.kept * case.rows), functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, head, logits = make(kept, case.width), make(case.vocab, case.width), make(kept, case.vocab)
    grad_x, grad_head = torch.empty_like(x), torch.empty_like(head)

    def run() -> None:
        torch.mm(x, head.T, out=logits)
        if case.teacher:
            torch.mm(x, head.T, out=logits)
        torch.mm(logits, head, out=grad_x)
        if case.train_head:
            torch.mm(logits.T, x, out=grad_head)

    return run


# ---- the loss of given logits -----------------------------------------------------------------------------

LOGITS = ((8192, 151936), (2048, 151936), (2048, 262144), (8192, 49152))


def in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Overwrites the logits with the gradient, and returns it."""
    options = {"teacher_kind": 0, "teacher_mix": 0.0, "softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0}
    torch.ops.dflash_ext.masked_cross_entropy_(logits.detach()[None], labels[None], None, None, **options)
    return logits


def _gradient(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(function(logits, labels), logits)
    return grad


def liger_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    # It overwrites the logits, too.
    return _gradient(LigerCrossEntropyLoss(reduction="sum"), logits, labels)


_torchs_sum = functools.partial(F.cross_entropy, reduction="sum")

OF_LOGITS = {
    "dflash_ext, in place": in_place,
    "dflash_ext": functools.partial(_gradient, lambda x, y: masked_cross_entropy(x, y, reduction="sum").loss),
    "torch": functools.partial(_gradient, _torchs_sum),
    "torch.compile": functools.partial(_gradient, torch.compile(_torchs_sum)),
    "liger": liger_of_logits,
}


def measured_logits(rows: int, vocab: int, chosen: list[str], rounds: int = 15) -> list[dict]:
    torch.manual_seed(0)
    fresh = (3 * torch.randn(rows, vocab, device="cuda")).bfloat16()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    few = slice(0, 64)
    exact = _gradient(_torchs_sum, fresh[few].double().requires_grad_(), labels[few])
    calls, errors_of = {}, {}
    for name, function in OF_LOGITS.items():
        impl = name.split(",")[0]
        if impl not in chosen or (impl in MODULES and importlib.util.find_spec(MODULES[impl]) is None):
            continue
        logits = fresh.clone().requires_grad_()
        got = function(logits[few].detach().requires_grad_(), labels[few])
        errors_of[name] = ((got.double() - exact).abs().max() / exact.abs().max()).item()
        calls[name] = functools.partial(function, logits, labels)
    timings = gpu_turns(calls, rounds=rounds, graphs=False)
    case, size = f"logits T{rows} V{vocab}", 2 * fresh.nbytes
    print(case, *(f"  {name}: {t.ms:.3f} ms, {size / t.ms / 1e9:.2f} TB/s" for name, t in timings.items()), sep="\n")
    return [
        {"case": case, "impl": name, "pass": "forward+backward", **timing.row()}
        | {"gbs": size / timing.ms / 1e6, "max_err": errors_of[name]}
        for name, timing in timings.items()
    ]


# ---- the measurements -------------------------------------------------------------------------------------


def step(function: Callable[[Inputs], Tensor], data: Inputs) -> Tensor:
    """A forward and a backward that makes new gradients."""
    for leaf in data.trained():
        leaf.grad = None
    loss = function(data)
    loss.backward()
    return loss.detach()


def peak_of(function: Callable[[Inputs], Tensor], data: Inputs) -> int:
    """The bytes that a step takes beyond weights and inputs."""
    for leaf in data.trained():
        leaf.grad = None
    return peak_bytes(lambda: step(function, data))


def errors(function: Callable[[Inputs], Tensor], data: Inputs, exact: list[Tensor]) -> list[float]:
    """The errors of the loss and of every gradient, each relative to the largest number of the exact result."""
    results = [step(function, data), *(leaf.grad for leaf in data.trained())]
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=True)]


def measured(case: Case, chosen: list[str], rounds: int = 15) -> list[dict]:
    data, functions = inputs_of(case), implementations(case, chosen)
    wide = data.double()
    exact = [step(torchs, wide), *(leaf.grad for leaf in wide.trained())]
    del wide
    found = {
        name: {"max_err": max(parts), "errors": parts, "peak_gb": peak_of(function, data) / 1e9}
        for name, function in functions.items()
        for parts in [errors(function, data, exact)]
    }
    del exact
    calls = {name: functools.partial(step, function, data) for name, function in functions.items()}
    timings = gpu_turns(calls | {"products": products(case)}, rounds=rounds, graphs=False)
    for leaf in data.trained():
        leaf.grad = None
    rows = [
        {"case": str(case), "impl": name, "pass": "forward+backward", **timing.row(), **found.get(name, {})}
        for name, timing in timings.items()
    ]
    print(case)
    for row in rows:
        extra = f", {row['peak_gb']:.2f} GB, error {row['max_err']:.1e}" if "max_err" in row else ""
        print(
            f"  {row['impl']}: {row['ms']:.2f} ms, {row['ms'] / timings['products'].ms:.2f}x{extra}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--case", nargs="*", type=int, choices=range(len(CASES)), default=list(range(len(CASES))))
    parser.add_argument("--logits", nargs="*", type=int, choices=range(len(LOGITS)), default=list(range(len(LOGITS))))
    arguments = parser.parse_args()
    name, ceilings = runner.gpu_name(), runner.gpu_ceilings()
    rows = []
    for index in arguments.logits:
        rows += measured_logits(*LOGITS[index], arguments.impl)
        runner.write(f"loss_{name}", rows, ceilings)
    for index in arguments.case:
        rows += measured(CASES[index], arguments.impl)
        runner.write(f"loss_{name}", rows, ceilings)


if __name__ == "__main__":
    main()
