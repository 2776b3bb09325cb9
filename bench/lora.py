"""LoRA drafters on the engine at the shapes of real models, with random weights: ``python -m bench.lora``.

A row is the time of a cycle, as a replay of the engine's own CUDA graph. `rows` are those of its largest forward, and
`steps` is its time in plain steps: the tokens that a cycle must commit to be as fast as plain decoding.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator

import torch

from bench import runner
from bench.engine_models import SHAPES, loaded, pair, replay
from bench.timing import event_turns
from dflash_ext.decode.kinds import one_forward_rows
from dflash_ext.models import DFlashDrafter, LoraDrafter, Target


def lora(target: Target, kind: str, rank: int, rows: int, sampler: int | None = None) -> LoraDrafter:
    """A random drafter of `rows` mask rows on all linear layers."""
    options = {"kind": kind, "rank": rank, "block_size": rows + 1, "sampler_width": sampler, "mask_token_id": 5}
    with torch.device("cuda"):
        drafter = LoraDrafter.for_target(target, **options)
    return drafter.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def drafters(target: Target, block: DFlashDrafter, rank: int, rows: int, groups: list[int]) -> dict[str, tuple]:
    """Drafters, their options of the engine, and the rows of a row's largest forward."""
    gated = lora(target, "gated", rank, rows)
    refined = lora(target, "gated", rank, rows, sampler=512)
    return {
        "DFlash": (block, {}, block.config.block_size),
        **{f"gated, one forward, groups: {n}": (gated, {"groups": n}, one_forward_rows(rows, n)) for n in groups},
        "gated, one forward, sampler head": (refined, {"groups": rows}, one_forward_rows(rows, rows)),
        "gated, two forwards": (gated, {"forwards": 2}, rows + 1),
        "whole, two forwards": (lora(target, "whole", rank, rows), {}, 2 * (rows + 1)),
    }


def shape_rows(name: str, target: Target, block: DFlashDrafter, given: argparse.Namespace) -> Iterator[dict]:
    """The rows of one shape. Each cycle takes turns with a plain step."""
    case = f"{name}, ctx {given.context}, {given.rows} mask rows, rank {given.rank}"
    found = drafters(target, block, given.rank, given.rows, given.groups or [given.rows, 1])
    found = {impl: each for impl, each in found.items() if any(part in impl for part in given.only)}
    for batch in given.batches:
        plain = loaded(target, None, batch, given.context)
        for impl, (drafter, options, count) in found.items():
            engine = loaded(target, drafter, batch, given.context, **options)
            calls = {"plain step": replay(plain, batch), impl: replay(engine, batch)}
            times = event_turns(calls, rounds=given.rounds)
            steps = round(times[impl].ms / times["plain step"].ms, 3)
            row = {"case": f"{case}, batch {batch}", "impl": impl, "rows": batch * count, "steps": steps}
            yield row | {"plain_ms": times["plain step"].ms} | times[impl].row()
            del engine, calls
            gc.collect()
            torch.cuda.empty_cache()
        del plain


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, default=7)
    parser.add_argument("--groups", nargs="*", type=int, help="of cycles of one forward; all, and one, by default")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of what is measured")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    rows = []
    for shape in given.shapes:
        target, block = pair(SHAPES[shape])
        for row in shape_rows(shape, target, block, given):
            rows.append(row)
            print(f"  {row['case']:60} {row['impl']:34} {row['ms']:8.3f} ms  {row['steps']:6.3f} steps", flush=True)
        print(runner.write(f"lora_{runner.gpu_name()}", rows, {}), flush=True)
        del target, block
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
