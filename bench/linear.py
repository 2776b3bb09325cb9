"""linear on the GPU against cuBLAS, one product at a time and as the layers of a model: ``python -m bench.linear``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runner
from bench.timing import Call, gpu_turns
from dflash_ext import linear

ROTATED_BYTES = 128 << 20
ROWS = (1, 8, 16, 32, 64, 128)
WEIGHTS = {
    "8B q, k and v": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate and up": (24576, 4096),
    "8B down": (4096, 12288),
    "8B head": (151936, 4096),
    "135M q, k and v": (960, 576),
    "135M o": (576, 576),
    "135M gate and up": (3072, 576),
    "135M down": (576, 1536),
    "135M head": (49152, 576),
}
# Hidden, packed q, k and v, intermediate size; layers that take more memory than the L2 cache has.
MODELS = {"8B": (4096, 6144, 12288, 8), "135M": (576, 960, 1536, 30)}

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5


def torchs(x: Tensor, weight: Tensor, *, gate: str | None = None, residual: Tensor | None = None) -> Tensor:
    y = F.linear(x, weight)
    if gate is not None:
        first, second = y.chunk(2, dim=-1)
        y = F.silu(first) * second
    return y if residual is None else y + residual


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "dflash_ext": partial(linear, constant_weight=True),
    "dflash_ext exact": partial(linear, constant_weight=True, exact=True),
    "cuBLAS": torchs,
}


def layers_of_a_model(product: Callable[..., Tensor], x: Tensor, layers: list[Layer]) -> Tensor:
    """The products of a model's layers with gate and residual, without norms and attention."""
    for qkv, out, gate_up, down in layers:
        heads = product(x, qkv)[:, : x.shape[1]].contiguous()
        x = product(heads, out, residual=x)
        x = product(product(x, gate_up, gate="silu"), down, residual=x)
    return x


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def replayed(call: Call) -> Call:
    """The call as a CUDA graph, so that launches from Python take no time."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rows_of(case: str, which: str, size: int, calls: dict[str, Call], errors: dict[str, float]) -> list[dict]:
    timings = gpu_turns(calls, graphs=which == "product")
    print(f"{case:28}", "  ".join(f"{impl} {1e3 * t.ms:.2f} us" for impl, t in timings.items()), flush=True)
    return [
        {"case": case, "impl": impl, "pass": which, **timing.row()}
        | {"gbs": size / timing.ms / 1e6, "max_err": errors[impl]}
        for impl, timing in timings.items()
    ]


def products() -> list[dict]:
    results = []
    for name, shape in WEIGHTS.items():
        size = 2 * shape[0] * shape[1]
        weights = [randn(*shape) for _ in range(max(2, -(-ROTATED_BYTES // size)))]
        for count in ROWS:
            x = randn(count, shape[1])
            want = x.double() @ weights[0].double().T
            errors = {impl: relative_error(product(x, weights[0]), want) for impl, product in PRODUCTS.items()}
            calls = {}
            for impl, product in PRODUCTS.items():
                turns = itertools.cycle(weights)
                calls[impl] = lambda product=product, turns=turns, x=x: product(x, next(turns))
            results += rows_of(f"{name}, {count} rows", "product", size, calls, errors)
    return results


def models() -> list[dict]:
    results = []
    for name, (hidden, qkv, inner, count) in MODELS.items():
        shapes = ((qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
        layers = [tuple(randn(*shape) for shape in shapes) for _ in range(count)]
        size = 2 * count * sum(rows * columns for rows, columns in shapes)
        for rows in ROWS:
            x = randn(rows, hidden)
            want = layers_of_a_model(torchs, x.float(), [tuple(w.float() for w in layer) for layer in layers]).double()
            calls = {impl: partial(layers_of_a_model, product, x, layers) for impl, product in PRODUCTS.items()}
            errors = {impl: relative_error(call(), want) for impl, call in calls.items()}
            graphs = {impl: replayed(call) for impl, call in calls.items()}
            results += rows_of(f"{count} layers of {name}, {rows} rows", "layers", size, graphs, errors)
    return results


def main() -> None:
    torch.manual_seed(0)
    name = f"linear_{runner.gpu_name()}"
    with torch.no_grad():
        rows = products() + models()
    print(runner.write(name, rows, runner.gpu_ceilings()))
    print(runner.plot(name, rows, "gbs"))


if __name__ == "__main__":
    main()
