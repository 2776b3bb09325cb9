"""block_attn_decode on the GPU against PyTorch's kernels, all in one run: ``python -m bench.decode``.

The rows of a block see the whole cache and each other, so that PyTorch needs no mask and its best way is open to it:
the query heads of a key head folded into rows.
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
from dflash_ext import IntervalMask, block_attn_decode

ROTATED_BYTES = 128 << 20


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
        """Of the keys and values that are read."""
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
    implementations = {
        "dflash_ext": ours(case, mask, exact=False),
        "dflash_ext exact": ours(case, mask, exact=True),
        "sdpa flash, folded": folded(case, SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn, folded": folded(case, SDPBackend.CUDNN_ATTENTION),
    }
    rows = []
    for impl, attend in implementations.items():
        try:
            err = error(attend(*sets[0])[0, 0], want)
        except RuntimeError as failure:  # a peer that cannot compute this is no reason to stop
            if impl.startswith("dflash_ext"):
                raise
            print(f"  {impl:20} not here: {str(failure).splitlines()[0][:90]}")
            continue
        turns = itertools.cycle(sets)
        ms = runner.gpu_ms(lambda attend=attend, turns=turns: attend(*next(turns)))
        rows.append(
            {"case": str(case), "impl": impl, "pass": "decode", "ms": ms, "gbs": case.bytes / ms / 1e6, "max_err": err}
        )
        print(f"  {impl:20} {1e3 * ms:7.1f} us {rows[-1]['gbs']:6.0f} GB/s  error {err:.1e}")
    peers = [row["ms"] for row in rows if row["impl"].startswith("sdpa")]
    if peers:
        rows[0]["ratio_to_best_peer"] = min(peers) / rows[0]["ms"]
        print(f"  {rows[0]['ratio_to_best_peer']:.2f}x the best peer")
    return rows


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
