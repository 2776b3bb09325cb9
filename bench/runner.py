"""What the benches share: the rates that the machine can reach, the form of the results, and the plots."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from bench.timing import gpu_turns

RESULTS = Path(__file__).parent / "results"


def gpu_name() -> str:
    """The short name of the GPU, such as h100, after which result files are named.

    It is h100_portable if DFLASH_EXT_GPU asks for the portable kernels.
    """
    if not torch.cuda.is_available():
        raise SystemExit(
            "this bench needs a GPU and a torch with CUDA; attention_cpu, loss_cpu and sampling_cpu need none"
        )
    names = torch.cuda.get_device_name().replace("NVIDIA", "").split()
    return "_".join([names[0].lower(), *filter(None, [os.environ.get("DFLASH_EXT_GPU")])])


def gpu_ceilings() -> dict[str, float]:
    """The rates that the GPU reaches in this run at a large matrix product and at a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = gpu_turns({"matmul": lambda: a @ a}) | gpu_turns({"copy": lambda: target.copy_(source)})
    return {
        "matmul_8192_bf16_tflops": 2 * 8192**3 / times["matmul"].ms / 1e9,
        "copy_tbs": 2 * source.numel() / times["copy"].ms / 1e9,
    }


def plot(name: str, rows: list[dict], rate: str) -> Path:
    """Draws ``results/<name>.png``: a group of bars for every case and pass, a bar for every implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if rate in row]
    groups = list(dict.fromkeys((row["case"], row["pass"]) for row in rows))
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.18 * len(rows) + 0.2 * len(groups)), layout="constrained")
    height = 0.85 / len(impls)
    for i, impl in enumerate(impls):
        mine = [(groups.index((row["case"], row["pass"])), row[rate]) for row in rows if row["impl"] == impl]
        bars = axes.barh([place + i * height for place, _ in mine], [value for _, value in mine], height, label=impl)
        axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=2)
    axes.set_yticks([place + 0.4 for place in range(len(groups))], [f"{case}\n{which}" for case, which in groups])
    axes.tick_params(labelsize=7)
    axes.set_ylim(len(groups), -0.3)
    axes.set_xlabel({"tflops": "TFLOP/s over visible pairs", "gbs": "GB/s"}[rate])
    axes.legend(fontsize=7)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=150)
    return path


def write(name: str, rows: list[dict], ceilings: dict[str, float] | None = None) -> Path:
    """Writes ``results/<name>.json``: the machine, the versions, and one dict for each measurement.

    A row has ``case``, ``impl``, ``pass``, ``ms`` (the median), ``quartiles_ms`` and ``max_err``. Some rows also have a
    rate (``tflops`` or ``gbs``). ceilings: the rates that the machine reached in the same run.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "device": _device(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "ceilings": ceilings or {},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
