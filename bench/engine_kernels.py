"""The kernels of a layer in the engine's graphs, and what each costs: ``python -m bench.engine_kernels qwen3-8b``.

Kernels overlap, because each may start while the one before it ends. So a kernel's cost is by how much it moves the end
of what has run so far.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.engine_models import SHAPES, bytes_of, loaded, pair, replay, timed

REPEATS = 5  # calls, of which the profiler delays some kernel in each


def timeline(call: Callable[[], object]) -> list[tuple[str, float]]:
    """The kernels of a call in the order of their starts, with their costs in us, the medians over some calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(REPEATS):
            call()
            torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    count = len(events) // REPEATS
    calls = [costs(events[first : first + count]) for first in range(0, count * REPEATS, count)]
    return [(short(event.name), median(each)) for event, *each in zip(events, *calls, strict=False)]


def costs(events: list) -> list[float]:
    """By how much each kernel of a call moves the end of what has run so far, in us."""
    found, end = [], events[0].time_range.start
    for event in events:
        found.append(max(end, event.time_range.end) - end)
        end = max(end, event.time_range.end)
    return found


def short(name: str) -> str:
    """A kernel's name without namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\b(?:\w+::)+|^void ", "", name)
    return name.split("(")[0][:60]


def layers_of(kernels: list[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """The kernels from each attention up to the next one."""
    at = [i for i, (name, _) in enumerate(kernels) if name.startswith("block_attn_decode")]
    return [kernels[first:last] for first, last in zip(at, at[1:], strict=False)]


def report(title: str, kernels: list[tuple[str, float]], bound_ms: float, ms: float) -> None:
    layers = layers_of(kernels)
    usual = median(len(layer) for layer in layers)
    alike = [layer for layer in layers if len(layer) == usual]
    print(f"{title}: {ms:.3f} ms, {bound_ms:.3f} by bytes; {len(kernels)} kernels, {usual:.0f} a layer", flush=True)
    for place, (name, _) in enumerate(alike[len(alike) // 2]):
        print(f"  {median(layer[place][1] for layer in alike):7.2f} us  {name}")
    within = sum(us for layer in alike for _, us in layer) / len(alike)
    total = sum(us for _, us in kernels)
    print(f"  {within:7.2f} us a layer; {total - within * (len(layers) + 1):.0f} us of {total:.0f} outside of layers")
    outside: dict[str, list[float]] = {}
    names = {name for layer in alike for name, _ in layer}
    for name, us in kernels:
        if name not in names:
            outside.setdefault(name, []).append(us)
    for name, each in sorted(outside.items(), key=lambda item: -sum(item[1])):
        print(f"  {sum(each):7.2f} us  {len(each):3} x {name}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--batches", nargs="*", type=int, default=[1])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--exact", action="store_true")
    given = parser.parse_args()
    rate = 3.0e9 if "H100" in torch.cuda.get_device_name() else 4.2e9
    for shape in given.shapes:
        target, drafter = pair(SHAPES[shape])
        for batch in given.batches:
            for name, draft in (("plain step", None), ("cycle", drafter)):
                call = replay(loaded(target, draft, batch, given.context, exact=given.exact), batch)
                ms = timed(call, 30).ms
                bound = bytes_of(target, draft, batch, given.context) / rate
                report(f"{shape}, batch {batch}, ctx {given.context}, {name}", timeline(call), bound, ms)


if __name__ == "__main__":
    main()
