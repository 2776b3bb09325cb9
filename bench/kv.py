"""kv_inject on the GPU against its own matrix product alone, and against PyTorch's operators: ``python -m bench.kv``.

The shapes are those of a DFlash drafter for Qwen3-8B: 5 layers of 8 key heads of 128, features of width 4096.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import runner
from bench.timing import gpu_turns
from dflash_ext import kv_inject, reference

LAYERS, HEADS, HEAD_DIM, WIDTH, CAPACITY, PAGE = 5, 8, 128, 4096, 8192, 64
OUT = LAYERS * 2 * HEADS * HEAD_DIM
LENGTHS = (1, 8, 16, 64, 512, 4096)


def pytorch(features, weight, k_caches, v_caches, positions, cos, sin, *, k_norm, block_table=None) -> None:
    """The same by PyTorch's operators in the features' dtype, without anything that waits for the device."""
    projected = F.linear(features, weight).unflatten(-1, (LAYERS, 2, HEADS, HEAD_DIM))
    c, s = (table[positions][:, :, None, None].to(features.dtype) for table in (cos, sin))
    keys = F.rms_norm(projected[:, :, :, 0], (HEAD_DIM,)) * k_norm[:, None]
    first, second = keys.chunk(2, dim=-1)
    keys = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    entry = torch.arange(len(features), device=features.device)[:, None]
    for layer in range(LAYERS):
        for cache, new in ((k_caches[layer], keys[:, :, layer]), (v_caches[layer], projected[:, :, layer, 1])):
            if block_table is None:
                cache.transpose(1, 2)[entry, positions] = new
            else:
                cache[block_table[entry, positions // PAGE], positions % PAGE] = new


def new_caches(paged: bool) -> Tensor:
    shape = (CAPACITY // PAGE, PAGE, HEADS) if paged else (1, HEADS, CAPACITY)
    return torch.zeros(2, LAYERS, *shape, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def rows_of(length: int, paged: bool) -> list[dict]:
    weights = [torch.randn(OUT, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5 for _ in range(2)]
    features = torch.randn(1, length, WIDTH, device="cuda", dtype=torch.bfloat16)
    angles = torch.outer(torch.arange(CAPACITY), 1e6 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).cuda()
    positions = torch.arange(length, device="cuda")[None]
    options = {"k_norm": torch.rand(LAYERS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) + 0.5}
    if paged:
        options["block_table"] = torch.arange(CAPACITY // PAGE, device="cuda", dtype=torch.int32)[None]
    rope = angles.cos(), angles.sin()

    want = new_caches(paged).double()
    wide = {name: x.double() if x.is_floating_point() else x for name, x in options.items()}
    reference.kv_inject(features.double(), weights[0].double(), *want, positions, *(x.double() for x in rope), **wide)
    calls, errors = {}, {"the product alone": 0.0}
    for impl, inject in (("dflash_ext", kv_inject), ("PyTorch", pytorch)):
        caches, turns = new_caches(paged), itertools.cycle(weights)
        inject(features, weights[0], *caches, positions, *rope, **options)
        errors[impl] = ((caches.double() - want).abs().max() / want.abs().max()).item()
        calls[impl] = lambda inject=inject, caches=caches, turns=turns: inject(
            features, next(turns), *caches, positions, *rope, **options
        )
    turns = itertools.cycle(weights)
    calls["the product alone"] = lambda: F.linear(features, next(turns))
    timings = gpu_turns(calls)
    case = f"5 layers h8 d128, S{length}, {'paged' if paged else 'contiguous'}"
    ratio = timings["dflash_ext"].ms / timings["the product alone"].ms
    print(f"{case:44}", "  ".join(f"{impl} {1e3 * t.ms:.1f} us" for impl, t in timings.items()), f"  {ratio:.2f}x")
    size = weights[0].nbytes + features.nbytes + 2 * 2 * length * OUT
    return [
        {"case": case, "impl": impl, "pass": "inject", **timing.row()}
        | {"gbs": size / timing.ms / 1e6, "max_err": errors[impl]}
        for impl, timing in timings.items()
    ]


def main() -> None:
    torch.manual_seed(0)
    name = f"kv_{runner.gpu_name()}"
    with torch.no_grad():
        rows = [row for paged in (False, True) for length in LENGTHS for row in rows_of(length, paged)]
    print(runner.write(name, rows, runner.gpu_ceilings()))
    print(runner.plot(name, rows, "gbs"))


if __name__ == "__main__":
    main()
