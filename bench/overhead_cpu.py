"""The time of the Python code around the native operators, on small tensors: ``python -m bench.overhead_cpu``."""

import torch

from bench import runner
from bench.timing import cpu_turns
from dflash_ext import IntervalMask, block_attn, block_attn_decode

native = torch.ops.dflash_ext


def measured(case: str, calls: dict) -> list[dict]:
    """calls: this package's function first, then the native operator with the same arguments."""
    results = [call() for call in calls.values()]
    error = (results[0] - results[1]).abs().max().item()
    timings = cpu_turns(calls, seconds=5.0)
    ours, operator = (timing.ms for timing in timings.values())
    print(f"{case:36} {1e3 * ours:6.1f} us, native operator {1e3 * operator:6.1f} us, {ours / operator:.2f}x")
    return [
        {"case": case, "impl": impl, "pass": "forward", **timing.row(), "max_err": error}
        for impl, timing in timings.items()
    ]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    rows = []
    with torch.no_grad():
        mask = IntervalMask.causal(8)
        bounds = mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi
        rows += measured(
            "block_attn, 8 rows over 8 keys",
            {
                "dflash_ext": lambda: block_attn(q, k, v, mask),
                "native operator": lambda: native.block_attn(q, k, v, *bounds, 8, None, 0.25, None, False)[0],
            },
        )
        rows += measured(
            "block_attn_decode, 8 rows over 8 keys",
            {
                "dflash_ext": lambda: block_attn_decode(q, k, v, mask),
                "native operator": lambda: native.block_attn_decode(q, k, v, *bounds, 8, None, None, False, 0.25, None),
            },
        )
    lens = torch.tensor([40, 17])
    timing = cpu_turns({"dflash_ext": lambda: IntervalMask.decode(lens, 16, kv_len=64)})["dflash_ext"]
    print(f"{'IntervalMask.decode':36} {1e3 * timing.ms:6.1f} us")
    rows.append({"case": "IntervalMask.decode, B2", "impl": "dflash_ext", "pass": "make", **timing.row(), "max_err": 0})
    print(runner.write("overhead_cpu", rows))


if __name__ == "__main__":
    main()
