"""The plot of a training run."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean


def plot_curve(log: list[dict], path: str | Path, meter: str = "tau") -> None:
    """Draws the loss, another figure of the training, and the same figure of evaluations over steps into a PNG.

    Args:
        log: as `run` returns it.
        meter: the name of the other figure in the log.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    for axes, key, colour in ((left, "loss", "tab:blue"), (right, meter, "tab:orange")):
        points = [(entry["step"], entry[key]) for entry in log if "loss" in entry and key in entry]
        x, y = ([point[i] for point in points] for i in (0, 1))
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(x, _running_mean(y, window=10), color=colour)
    held_out = f"eval_{meter}"
    if measured := [(entry["step"], entry[held_out]) for entry in log if held_out in entry]:
        right.plot(*zip(*measured, strict=True), "o-", color="tab:green", label=f"{meter} in evaluations")
        right.legend(loc="lower right")
    left.set_xlabel("step")
    left.set_ylabel("loss", color="tab:blue")
    right.set_ylabel(f"{meter} on training samples", color="tab:orange")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _running_mean(values: list[float], window: int) -> list[float]:
    """The mean of the last `window` values. The sequences of a batch have similar lengths, so single values jump."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
