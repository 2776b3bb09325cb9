"""Calls of `verify` for NVIDIA's compute-sanitizer, with inputs made on the CPU, so that few other kernels run:

    compute-sanitizer --tool memcheck python -m bench.sanitize large described
    compute-sanitizer --tool racecheck python -m bench.sanitize small "point mass"

The forms of a draft are "described" (by the pivot and the normaliser of its draw), "logits" and "point mass". Every
result is compared with the CPU's. "control" in the place of a form names a row of a table that does not exist, which
memcheck must report.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from dflash_ext import sample, verify

SHAPES = {"large": (1, 15, 151936, torch.bfloat16), "small": (3, 4, 1001, torch.float16)}
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k": {"temperature": 1.0, "top_k": 50},
}
BY_ROW = {"temperature": torch.tensor([0.0, 1.0, 0.7]), "top_p": torch.tensor([0.5, 0.9, 1.0])}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1}


def case(shape: str, form: str, options: dict) -> dict:
    """The arguments of a call, with drafts close to the target."""
    batch, drafted, vocab, dtype = SHAPES[shape]
    draw = torch.Generator().manual_seed(vocab + len(form))
    target = 3 * torch.randn(batch, drafted + 1, vocab, generator=draw)
    drafter = (target[:, :-1] + 0.3 * torch.randn(batch, drafted, vocab, generator=draw)).to(dtype)
    drawn = sample(drafter, 7, **options)
    given = {
        "draft_tokens": drawn.token,
        "target_logits": target.to(dtype),
        "uniforms": torch.rand(batch, drafted + 1, dtype=torch.float64, generator=draw),
    }
    if form != "point mass":
        given["draft_logits"] = drafter
    if form == "described":
        given |= {"draft_pivot": drawn.pivot, "draft_normaliser": drawn.normaliser}
    return given | options


def call(name: str, given: dict) -> None:
    want = verify(**given)
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in given.items()}
    torch.cuda.synchronize()
    began = time.perf_counter()
    got = verify(**moved)
    accepted, token = got.accepted.cpu(), got.next_token.cpu()
    seconds = time.perf_counter() - began
    same = torch.equal(accepted, want.accepted) and torch.equal(token, want.next_token)
    print(f"{name}: accepted {accepted.tolist()}, as on the CPU: {same}, {seconds:.2f} s", flush=True)


def main(shape: str, form: str) -> None:
    batch, _, vocab, _ = SHAPES[shape]
    if form == "control":
        tables = {"logit_bias": torch.zeros(batch, vocab), "table_rows": torch.full((batch,), 1 << 24)}
        moved = {n: x.cuda() for n, x in (case(shape, form, {}) | tables).items()}
        print(verify(**moved, temperature=1.0))
        return
    for name, options in OPTIONS.items():
        call(name, case(shape, form, options))
    if shape == "small":
        given = case(shape, "logits" if form == "described" else form, {"temperature": 1.0})
        call("by row", given | BY_ROW)
        counts = torch.randint(-1, 3, (batch, vocab), generator=torch.Generator().manual_seed(1)).int()
        for temperature in (0.0, 1.0):
            name = f"penalties, temperature {temperature:g}"
            call(name, given | PENALTIES | {"token_counts": counts, "temperature": temperature})


if __name__ == "__main__":
    main(*sys.argv[1:])
