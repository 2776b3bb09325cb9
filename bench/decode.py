"""block_attn_decode on the GPU against PyTorch's kernels, all in one run: ``python -m bench.decode``.

The rows of a block see the whole cache and each other. So PyTorch needs no mask, and it is called in the way that is
fastest for it: the query heads that share a key head are folded into rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import runner
from bench.cases import error, exact_head
from bench.timing import SHORT_MS, Call, Timing, gpu_turns, graph_turns
from dflash_ext import IntervalMask, block_attn_decode

ROTATED_BYTES = 128 << 20
OURS, EXACT = "dflash_ext", "dflash_ext exact"


@dataclass(frozen=True)
class Case:
    rows: int
    batch: int
    cached: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return f"q{self.rows} ctx {self.cached}, B{self.batch} h{self.heads}/{self.kv_heads} d{self.head_dim}"

    @property
    def bytes(self) -> int:
        """The size of the keys and values that are read."""
        return 4 * self.batch * self.kv_heads * (self.cached + self.rows) * self.head_dim

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [(self.batch, self.heads, self.rows, self.head_dim)]
        shapes += [(self.batch, self.kv_heads, self.cached + self.rows, self.head_dim)] * 2
        return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)


CASES = [
    Case(16, 1, 2048),
    Case(16, 1, 16384),
    Case(16, 8, 4096),
    Case(16, 32, 4096),
    Case(1, 8, 4096),
    Case(256, 1, 2048, 16, 8, 256),
    Case(256, 8, 4096, 16, 8, 256),
]


def ours(case: Case, mask: IntervalMask, exact: bool) -> Callable[..., Tensor]:
    planned = mask.plan(case.heads, case.kv_heads, case.head_dim, decode=True)
    return lambda q, k, v: block_attn_decode(q, k, v, planned, exact=exact)


def folded(case: Case, backend: SDPBackend) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q.reshape(case.batch, case.kv_heads, -1, case.head_dim), k, v)
        return out.view(q.shape)

    return attend


def rows_of(case: Case) -> list[dict]:
    mask = IntervalMask.decode(case.cached, case.rows, device="cuda")
    sets = [case.inputs() for _ in range(max(1, -(-ROTATED_BYTES // case.bytes)))]
    want = exact_head(*sets[0], mask)
    errors: dict[str, float] = {}
    calls: dict[str, Call] = {}
    for impl, attend in {
        OURS: ours(case, mask, exact=False),
        EXACT: ours(case, mask, exact=True),
        "sdpa flash, folded": folded(case, SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn, folded": folded(case, SDPBackend.CUDNN_ATTENTION),
    }.items():
        try:
            errors[impl] = error(attend(*sets[0])[0, 0], want)
        except RuntimeError as failure:  # A peer that cannot compute this case does not stop the bench.
            if impl in (OURS, EXACT):
                raise
            print(f"  {impl:20} cannot compute it: {str(failure).splitlines()[0][:90]}")
            continue
        turns = itertools.cycle(sets)
        calls[impl] = lambda attend=attend, turns=turns: attend(*next(turns))
    timings = {"decode": gpu_turns(calls)}
    if timings["decode"][OURS].ms < SHORT_MS:
        timings["decode between GEMMs"] = between_gemms(calls, case)
    rows = []
    for which, by_impl in timings.items():
        mine = [
            {"case": str(case), "impl": impl, "pass": which, **timing.row()}
            | {"gbs": case.bytes / timing.ms / 1e6, "max_err": errors[impl]}
            for impl, timing in by_impl.items()
        ]
        for row in mine:
            print(f"  {which:20} {row['impl']:20} {1e3 * row['ms']:7.1f} us {row['gbs']:6.0f} GB/s", end="")
            print(f"  error {row['max_err']:.1e}", flush=True)
        if peers := [row["ms"] for row in mine if row["impl"].startswith("sdpa")]:
            mine[0]["ratio_to_best_peer"] = min(peers) / mine[0]["ms"]
            print(f"  {which:20} {mine[0]['ratio_to_best_peer']:.2f}x the best peer")
        rows += mine
    return rows


def between_gemms(calls: dict[str, Call], case: Case) -> dict[str, Timing]:
    """The time that a call adds between matrix products, as between the projections of a model's layers.

    A call that follows itself may overlap its own launch; other kernels around it prevent that. The time of the
    products alone is subtracted.
    """
    width = case.heads * case.head_dim
    weights = itertools.cycle([torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)])
    rows = torch.randn(case.batch * case.rows, width, device="cuda", dtype=torch.bfloat16)

    def gemm() -> Tensor:
        return rows @ next(weights)

    timings = graph_turns({"gemm": gemm} | {impl: lambda call=call: (gemm(), call()) for impl, call in calls.items()})
    alone = timings.pop("gemm").ms
    return {impl: Timing(*(value - alone for value in timing)) for impl, timing in timings.items()}


def main() -> None:
    torch.manual_seed(0)
    name = f"decode_{runner.gpu_name()}"
    rows = []
    for case in CASES:
        print(case, flush=True)
        rows += rows_of(case)
    print(runner.write(name, rows, runner.gpu_ceilings()))
    print(runner.plot(name, rows, "gbs"))


if __name__ == "__main__":
    main()
