"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path


def plot_curve(log: list[dict], path: str | Path) -> None:
    """Draws loss and teacher-forced tau over steps, from the log that `train_drafter` returns, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [entry for entry in log if "loss" in entry]
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    x = [entry["step"] for entry in steps]
    left.plot(x, [entry["loss"] for entry in steps], color="tab:blue")
    right.plot(x, [entry.get("tau") for entry in steps], color="tab:orange")
    left.set_xlabel("step")
    left.set_ylabel("loss", color="tab:blue")
    right.set_ylabel("tau on training blocks (teacher-forced)", color="tab:orange")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
