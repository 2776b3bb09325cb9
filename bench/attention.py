"""block_attn on the GPU against its peers, all in one run: ``python -m bench.attention [part of a case's name]``.

Results are written when all cases run.
"""

from __future__ import annotations

import sys
import warnings

import torch

from bench import runner
from bench.attention_peers import CAUSAL, PEERS
from bench.cases import TRAINING_CASES, Case, error, exact_head, visible_pairs
from dflash_ext import IntervalMask


def forward_rows(case: Case) -> list[dict]:
    """A row for everybody who can compute the case; each is checked on the call that is timed."""
    mask = case.mask()
    inputs = case.inputs(mask)
    want = exact_head(*inputs, mask)
    pairs = visible_pairs(mask, case.batch)
    square = mask.q_len == mask.kv_len
    causal = IntervalMask.causal(mask.kv_len, device="cuda") if square else None
    is_causal = square and visible_pairs(causal, case.batch) == pairs
    rows = []
    for impl, make in (PEERS | (CAUSAL if square else {})).items():
        is_reference = impl in CAUSAL
        try:
            call = make(mask, *inputs)
            got = call()[0, 0]
        except Exception as failure:  # a peer that cannot compute this is no reason to stop
            print(f"  {impl:28} not here: {str(failure).strip().splitlines()[0][:90]}")
            continue
        err = error(got, exact_head(*inputs, causal) if is_reference else want)
        flops = case.flops(visible_pairs(causal, case.batch) if is_reference else pairs)
        ms = runner.gpu_ms(call)
        rows.append(
            {"case": str(case), "impl": impl, "pass": "forward", "ms": ms, "tflops": flops / ms / 1e9, "max_err": err}
        )
        print(f"  {impl:28} {ms:8.3f} ms {rows[-1]['tflops']:6.0f} TFLOP/s  error {err:.1e}")
        del call, got
        torch.cuda.empty_cache()
    return with_ratio(rows, is_causal)


def with_ratio(rows: list[dict], is_causal: bool) -> list[dict]:
    """Adds to this package's row how its speed compares with that of the best peer: causal kernels are peers where the
    mask is causal."""
    ours = next(row for row in rows if row["impl"] == "dflash_ext")
    peers = [row["ms"] for row in rows if row is not ours and (is_causal or row["impl"] not in CAUSAL)]
    if peers:
        ours["ratio_to_best_peer"] = min(peers) / ours["ms"]
        print(f"  {ours['ratio_to_best_peer']:.2f}x the best peer")
    return rows


def plan_rows() -> list[dict]:
    """How long the plan of the training mask takes to make."""
    mask = TRAINING_CASES[3].mask()
    ms = runner.gpu_ms(lambda: mask.plan(32, 8, 128))
    print(f"plan of {TRAINING_CASES[3].name}: {1e3 * ms:.1f} us")
    return [{"case": f"plan, {TRAINING_CASES[3].name}", "impl": "dflash_ext", "pass": "plan", "ms": ms, "max_err": 0.0}]


def main() -> None:
    warnings.simplefilter("ignore")  # PyTorch says at length why a backend cannot serve a call
    torch.manual_seed(0)
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    name, ceilings = f"attention_{runner.gpu_name()}", runner.gpu_ceilings()
    rows = plan_rows()
    for case in TRAINING_CASES:
        if wanted in str(case):
            print(case, flush=True)
            rows += forward_rows(case)
            if not wanted:
                path = runner.write(name, rows, ceilings)  # what has been measured stays, whatever stops the rest
    if not wanted:
        print(path, runner.plot(name, rows, "tflops"), sep="\n")


if __name__ == "__main__":
    main()
