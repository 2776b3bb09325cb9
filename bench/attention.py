"""block_attn on the GPU against its peers, all in one run: ``python -m bench.attention [part of a case's name]``.

Every case is run forward, backward, and forward and backward together. Results are written when all cases run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench import runner
from bench.attention_peers import CAUSAL, DENSE, DETERMINISTIC, OURS, PEERS, Attend
from bench.cases import ANCHORS, BACKWARD, BOTH, FORWARD, TRAINING_CASES, Case, causal, exact, visible_pairs
from bench.timing import Call, gpu_turns

FLOPS = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}  # in multiples of the forward's operations


def rows_of(case: Case) -> list[dict]:
    """Times a case: three rows (passes) for every implementation that can compute it.

    Each implementation is checked on the inputs that are timed.
    """
    pattern = case.pattern()
    mask = pattern.mask
    inputs = [x.requires_grad_() for x in case.inputs(mask)]
    upstream = torch.randn_like(inputs[0])
    square = mask.q_len == mask.kv_len
    causal_mask = causal(mask.kv_len).mask if square else None
    pairs = {False: visible_pairs(mask, case.batch)}
    wanted = {False: exact(*inputs, upstream, mask)}
    if square:
        pairs[True], wanted[True] = visible_pairs(causal_mask, case.batch), exact(*inputs, upstream, causal_mask)

    functions: dict[str, Attend] = {}
    errors: dict[str, dict[str, float]] = {}
    for impl, make in (PEERS | DENSE | (CAUSAL if square else {})).items():
        try:
            attend = make(case, pattern)
            out = attend(*inputs)
            grads = torch.autograd.grad(out, inputs, upstream)
        except Exception as failure:  # A peer that cannot compute this case does not stop the bench.
            if impl in (OURS, DETERMINISTIC):
                raise
            print(f"  {impl:28} cannot compute it: {str(failure).strip().splitlines()[0][:90]}")
            continue
        forward_error, backward_error = wanted[impl in CAUSAL].errors(out.detach(), grads)
        functions[impl] = attend
        errors[impl] = {FORWARD: forward_error, BACKWARD: backward_error, BOTH: backward_error}
        del out, grads
    rows = []
    for which, calls in calls_of(functions, inputs, upstream):
        timings = gpu_turns(calls, graphs=which == FORWARD)
        for impl, timing in timings.items():
            flops = FLOPS[which] * case.flops(pairs[impl in CAUSAL])
            row = {"case": str(case), "impl": impl, "pass": which, **timing.row()}
            rows.append(row | {"tflops": flops / timing.ms / 1e9, "max_err": errors[impl][which]})
            print(f"  {which:16} {impl:28} {timing.ms:8.3f} ms {rows[-1]['tflops']:6.0f} TFLOP/s ", end="")
            print(f" error {errors[impl][which]:.1e}", flush=True)
        add_ratio(rows, which, str(case), pattern.is_causal)
    return rows


def calls_of(
    functions: dict[str, Attend], inputs: list[Tensor], upstream: Tensor
) -> Iterator[tuple[str, dict[str, Call]]]:
    """Yields each pass with the calls that are timed."""

    def forward(attend: Attend) -> Tensor:
        with torch.no_grad():
            return attend(*inputs)

    def both(attend: Attend) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, upstream)

    yield FORWARD, {impl: partial(forward, attend) for impl, attend in functions.items()}
    outs = {impl: attend(*inputs) for impl, attend in functions.items()}
    backward = partial(torch.autograd.grad, inputs=inputs, grad_outputs=upstream, retain_graph=True)
    yield BACKWARD, {impl: partial(backward, out) for impl, out in outs.items()}
    outs.clear()
    yield BOTH, {impl: partial(both, attend) for impl, attend in functions.items()}


def add_ratio(rows: list[dict], which: str, case: str, is_causal: bool) -> None:
    """Adds the ratio to the best peer to this package's row.

    Causal kernels count as peers if the mask is causal. Dense masks never count.
    """
    mine = [row for row in rows if row["case"] == case and row["pass"] == which]
    ours = next(row for row in mine if row["impl"] == OURS)
    not_counted = {OURS, DETERMINISTIC, *DENSE, *(() if is_causal else CAUSAL)}
    if peers := [row["ms"] for row in mine if row["impl"] not in not_counted]:
        ours["ratio_to_best_peer"] = min(peers) / ours["ms"]
        print(f"  {which:16} {ours['ratio_to_best_peer']:.2f}x the best peer")


def plan_rows() -> list[dict]:
    """The time that it takes to make the plan of the training mask."""
    mask = ANCHORS.pattern().mask
    timing = gpu_turns({OURS: lambda: mask.plan(ANCHORS.heads, ANCHORS.kv_heads, ANCHORS.head_dim)})[OURS]
    print(f"plan of {ANCHORS.name}: {1e3 * timing.ms:.1f} us")
    return [{"case": f"plan, {ANCHORS.name}", "impl": OURS, "pass": "plan", **timing.row(), "max_err": 0.0}]


def main() -> None:
    warnings.simplefilter("ignore")  # PyTorch says at length why a backend cannot serve a call.
    torch.manual_seed(0)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    name, ceilings = f"attention_{runner.gpu_name()}", runner.gpu_ceilings()
    rows = plan_rows()
    for case in TRAINING_CASES:
        if wanted in str(case):
            print(case, flush=True)
            rows += rows_of(case)
            torch.cuda.empty_cache()
            if not wanted:
                path = runner.write(name, rows, ceilings)  # The cases so far stay if a later one fails.
    if not wanted:
        print(path, runner.plot(name, rows, "tflops"), sep="\n")


if __name__ == "__main__":
    main()
