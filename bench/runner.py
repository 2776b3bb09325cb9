"""What the benches share: paired timing, and the form in which results are written."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def paired_ms(functions: dict[str, Callable[[], object]], *, seconds: float = 3.0) -> dict[str, float]:
    """The median time of each function in milliseconds, on the CPU.

    The functions take turns, so that whatever else the machine does meets all of them. The turns go on for
    ``seconds``, at least five of them; a function that takes less than a millisecond is called often in its turn.
    """
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, int(1e-3 / max(_elapsed(function, 1), 1e-9)))
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[name]) < 5:
        for name, function in functions.items():
            times[name].append(_elapsed(function, calls[name]) / calls[name])
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}


def _elapsed(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


FLUSHED_BYTES = 256 << 20  # more than any L2 cache
GRAPH_CALLS = 32
SHORT_MS = 0.05
LAUNCH_MS = 0.5  # a call that takes less may be waiting for its own launch


def gpu_ms(function: Callable[[], object], *, repeats: int = 15) -> float:
    """The median time of a call in milliseconds, on the GPU, with its L2 cache flushed before each.

    A call that may be shorter than its own launch is replayed from a CUDA graph. One that takes less than 50 us is
    timed as one of 32 in a graph: functions that are that short should go through more than 100 MB of inputs in them.
    """
    for _ in range(3):
        function()
    # The cache is left full of clean lines: writing back would slow down what is timed.
    flush = torch.zeros(FLUSHED_BYTES // 4, device="cuda").sum
    ms = _median_event_ms(function, flush, repeats)
    if ms > LAUNCH_MS:
        return ms
    in_graph = _median_event_ms(_graph(function, GRAPH_CALLS).replay, flush, repeats) / GRAPH_CALLS
    return in_graph if in_graph < SHORT_MS else _median_event_ms(_graph(function, 1).replay, flush, repeats)


def _graph(function: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def _median_event_ms(function: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        before()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def gpu_name() -> str:
    """Such as h100: what the results' files are named after."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "this bench needs a GPU and a torch with CUDA; attention_cpu, loss_cpu and sampling_cpu need none"
        )
    names = torch.cuda.get_device_name().replace("NVIDIA", "").split()
    return names[0].lower()


def gpu_ceilings() -> dict[str, float]:
    """What the GPU reaches in this run at a large matrix product and at copying."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_8192_bf16_tflops": 2 * 8192**3 / gpu_ms(lambda: a @ a) / 1e9,
        "copy_tbs": 2 * source.numel() / gpu_ms(lambda: target.copy_(source)) / 1e9,
    }


def plot(name: str, rows: list[dict], rate: str) -> Path:
    """Draws ``results/<name>.png``: a group of bars for every case and pass, a bar for everybody."""
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
    """Writes ``results/<name>.json``: the machine, the versions, and one dict a measurement.

    A row has ``case``, ``impl``, ``pass``, ``ms`` and ``max_err``, and a rate where one means something.
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
