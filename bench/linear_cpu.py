"""linear on the CPU against the time of reading the weights once, over all products of SmolLM2-135M:
``python -m bench.linear_cpu``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runner
from bench.timing import cpu_turns
from dflash_ext import linear

ROWS = (1, 4, 8, 16, 32)
LAYERS = 30
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # packed q, k and v; o; packed gate and up; down
HEAD = (49152, 576)


Multiply = Callable[[Tensor, Tensor], Tensor]


def products(multiply: Multiply, rows: dict[int, Tensor], weights: list[Tensor]) -> None:
    for weight in weights:
        multiply(rows[weight.shape[1]], weight)


def largest_error(
    multiply: Callable[[Tensor, Tensor], Tensor], rows: dict[int, Tensor], weights: list[Tensor]
) -> float:
    """The largest error of one layer's products, each relative to its largest number."""
    errors = []
    for weight in weights[: len(LAYER)]:
        x = rows[weight.shape[1]]
        want = x.double() @ weight.double().T
        errors.append(((multiply(x, weight).double() - want).abs().max() / want.abs().max()).item())
    return max(errors)


def measured(dtype: torch.dtype) -> list[dict]:
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in LAYER * LAYERS + (HEAD,)]
    size = sum(weight.nbytes for weight in weights)
    memory = torch.ones(size // 4)
    results = []
    for count in ROWS:
        rows = {width: torch.randn(count, width).to(dtype) for width in (576, 1536)}
        calls = {
            "read": memory.sum,
            "dflash_ext": lambda rows=rows: products(linear, rows, weights),
            "torch": lambda rows=rows: products(F.linear, rows, weights),
        }
        errors = {"dflash_ext": largest_error(linear, rows, weights), "torch": largest_error(F.linear, rows, weights)}
        timings = cpu_turns(calls)
        read, ours, torchs = (timing.ms for timing in timings.values())
        case = f"SmolLM2-135M, {count} rows, {str(dtype).split('.')[1]}"
        print(f"{case}: read {read:.1f} ms, ours {ours / read:.2f}x, torch {torchs / read:.2f}x that")
        results += [
            {"case": case, "impl": impl, "pass": "forward", **timing.row(), "max_err": errors.get(impl, 0.0)}
            | {"gbs": size / timing.ms / 1e6}
            for impl, timing in timings.items()
        ]
    return results


def main() -> None:
    with torch.no_grad():
        rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measured(dtype)]
    print(runner.write("linear_cpu", rows))


if __name__ == "__main__":
    main()
