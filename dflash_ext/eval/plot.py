"""The plot of an evaluation: acceptance by position, and the speed beside that of plain decoding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..decode import Decoded


def check_plot(path: Path) -> None:
    """Raises ValueError if no plot can be drawn into `path`, before anything is computed for it."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {path}: a name that ends in .png or .svg is expected")


def plot_evaluation(results: Mapping[str, Mapping[str, Decoded]], path: str | Path) -> None:
    """Draws a PNG or SVG, as the ending of `path` says.

    Args:
        results: by prompt set, the runs by their names. The first run of a set is that of the drafter, whose acceptance
            rates are drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, runs in results.items():
        first = next(iter(runs.values()))
        rates = [100 * share for share in first.acceptance]
        left.plot(range(1, len(rates) + 1), rates, "o-", label=f"{name}, tau {first.tau:.2f}")
    left.set_xlabel("position in the block")
    left.set_ylabel("cycles that accepted the drafted token, %")
    left.set_ylim(0, 100)
    left.legend()
    ways = list(dict.fromkeys(way for runs in results.values() for way in runs))
    for at, way in enumerate(ways):
        speeds = [runs[way].tokens_per_second if way in runs else 0.0 for runs in results.values()]
        places = [place + (at - (len(ways) - 1) / 2) * 0.8 / len(ways) for place in range(len(results))]
        right.bar(places, speeds, 0.8 / len(ways), label=way)
    right.set_xticks(range(len(results)), list(results))
    right.set_ylabel("tokens per second, without prefill")
    right.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
