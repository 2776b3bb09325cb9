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


def write(name: str, rows: list[dict], ceilings: dict[str, float] | None = None) -> Path:
    """Writes ``results/<name>.json``: the machine, the versions, and one dict a measurement.

    A row has ``case``, ``impl``, ``pass``, ``ms`` and ``max_err``, and a rate where one means something.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True
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
