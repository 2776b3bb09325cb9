"""How well denoisers fill in hidden tokens of real text, at several rates, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from ..data import NoiseCollator, TextDataset, check_blocks
from ..models import Adaptation
from ..noise import MaskNoise, Share
from ..ops import linear_cross_entropy
from .metrics import Interval, as_json, interval, resamples

HALF = Share(0.5, 0.5)
FIGURES = ("accuracy", "nll", "spans")  # what is reported; spans are runs of hidden tokens, all of them right


@dataclass(frozen=True)
class Reconstruction:
    """What a denoiser filled in at one rate: by figure, its sum and what it is divided by in each row, float64 [N, 2].

    "accuracy": the hidden tokens that are the most probable one; "nll": their negative log-likelihood in nats; "spans":
    the runs of neighbouring hidden tokens of which every one is right.
    """

    sums: Mapping[str, Tensor]

    def interval(self, figure: str, seed: int = 0) -> Interval:
        """The figure over all rows, and its bootstrap interval over rows."""
        return interval(*self._of(figure, seed))

    def difference(self, base: Reconstruction, figure: str, seed: int = 0) -> tuple[Interval, Interval]:
        """How much the figure is above that of `base` on the same rows, and that as a share of the latter."""
        (mine, drawn), (theirs, others) = self._of(figure, seed), base._of(figure, seed)
        relative = mine / theirs - 1 if theirs else math.nan
        return interval(mine - theirs, drawn - others), interval(relative, drawn / others - 1)

    def _of(self, figure: str, seed: int) -> tuple[float, Tensor]:
        sums = self.sums[figure]
        drawn = resamples(len(sums), seed) @ sums
        total = sums.sum(0)
        return float(total[0] / total[1]), drawn[:, 0] / drawn[:, 1]


@torch.no_grad()
def reconstruct(
    adaptation: Adaptation,
    text: TextDataset,
    rates: Sequence[float],
    *,
    span: float = 3.0,
    prefix: Share = HALF,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> dict[float, Reconstruction]:
    """Hides tokens of rows of text at each rate, and lets a denoiser fill them in, all in one forward.

    What is hidden follows from the rate, the seed and the row, so that denoisers differ in nothing else. Each sees what
    it saw in training: with the pattern block_causal these are also the right tokens of earlier blocks.

    Args:
        rates: the share of a denoising block that is hidden.
        span, prefix: as in `MaskNoise` and `NoiseCollator`.
        batch_size: rows in a forward.
        on_progress: called with the number of rows of each forward.

    Raises:
        DataError: no document of the text is long enough to be denoised.
    """
    check_blocks(text)
    found = {}
    for rate in rates:
        collator = NoiseCollator(MaskNoise(Share(rate, rate), span), prefix, adaptation.config.block_size)
        sums = {figure: [] for figure in FIGURES}
        for first in range(0, len(text), batch_size):
            rows = range(first, min(first + batch_size, len(text)))
            batch = collator([{**text[row], "key": (seed, f"rate {rate}", row)} for row in rows])
            for figure, of_rows in _of_batch(adaptation, batch).items():
                sums[figure].append(of_rows)
            on_progress(len(rows))
        found[rate] = Reconstruction({figure: torch.cat(parts) for figure, parts in sums.items()})
    return found


def _of_batch(adaptation: Adaptation, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of `Reconstruction` for the rows of a batch."""
    target = adaptation.target
    on_device = {name: value.to(target.device) for name, value in batch.items()}
    ids, hidden = on_device["input_ids"], on_device["hidden"]
    states = adaptation(*adaptation.inputs(on_device))[:, : ids.shape[1]]
    head = adaptation.head
    result = linear_cross_entropy(
        states.to(head.dtype), head, ids, hidden.float(), reduction="none", softcap=target.softcap
    )
    right = result.correct & hidden
    count = hidden.sum(1)
    return {
        "accuracy": torch.stack([right.sum(1), count], dim=1).double().cpu(),
        "nll": torch.stack([result.nll.double().mul(hidden).sum(1), count], dim=1).double().cpu(),
        "spans": _spans(right.cpu(), batch["hidden"], batch["starts"]),
    }


def _spans(right: Tensor, hidden: Tensor, starts: Tensor) -> Tensor:
    """For each row, the runs of hidden tokens that are all right, and all runs. A run ends with its document."""
    before = torch.nn.functional.pad(hidden, (1, 0))[:, :-1]
    first = hidden & (~before | (torch.arange(hidden.shape[1]) == starts))
    number = first.cumsum(1)  # of the run that a hidden token belongs to, from 1 on
    wrong = torch.zeros(len(hidden), hidden.shape[1] + 1, dtype=torch.int64)
    wrong.scatter_add_(1, number, (hidden & ~right).long())
    runs = first.sum(1)
    is_run = torch.arange(1, wrong.shape[1]) <= runs[:, None]
    return torch.stack([((wrong[:, 1:] == 0) & is_run).sum(1), runs], dim=1).double()


def figures(results: Mapping[str, Mapping[float, Reconstruction]], seed: int = 0) -> dict:
    """The figures of several denoisers, ready for JSON: by denoiser and rate, each with its interval.

    Those behind the first denoiser also have their differences from it, `absolute` and `relative`.
    """
    (first, base), *_ = results.items()
    told = {}
    for name, by_rate in results.items():
        told[name] = {}
        for rate, found in by_rate.items():
            row = {}
            for figure in FIGURES:
                row[figure] = found.interval(figure, seed)._asdict()
                if name != first:
                    absolute, relative = found.difference(base[rate], figure, seed)
                    row[figure] |= {"absolute": absolute._asdict(), "relative": relative._asdict()}
            told[name][f"{rate:g}"] = row
    return as_json(told)


def table(results: Mapping[str, Mapping[float, Reconstruction]], seed: int = 0) -> Table:
    """A row for each rate and denoiser; differences are from the first denoiser."""
    view = Table(
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # so that names and figures fit into 80 columns
        caption="right: the share of hidden tokens that are right\n"
        "more: how many more are right than with the first denoiser, in points and relative\n"
        "spans: the share of runs of hidden tokens that are all right\n"
        "±: 95% of a bootstrap over rows",
        caption_justify="left",
    )
    view.add_column("hidden", justify="right", no_wrap=True)
    view.add_column("denoiser", overflow="fold", min_width=8)
    for column in ("right, %", "more", "more, %", "NLL", "spans, %"):
        view.add_column(column, justify="right", no_wrap=True)
    (first, base), *_ = results.items()
    for rate in base:
        for name, by_rate in results.items():
            found = by_rate[rate]
            accuracy, nll, spans = (found.interval(figure, seed) for figure in FIGURES)
            more = ("", "")
            if name != first:
                absolute, relative = found.difference(base[rate], "accuracy", seed)
                more = _percent(absolute, "+.1f"), _percent(relative, "+.0f")
            view.add_row(f"{100 * rate:.4g}%", name, _percent(accuracy), *more, nll.shown(".2f"), _percent(spans))
    return view


def _percent(of: Interval, form: str = ".1f") -> str:
    return Interval(*(100 * value for value in of)).shown(form)


def plot_reconstruction(results: Mapping[str, Mapping[float, Reconstruction]], path: str | Path, seed: int = 0) -> None:
    """Draws accuracy and span recovery over the rate into a PNG or SVG, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name, label in zip(panels, ("accuracy", "spans"), ("right tokens, %", "right spans, %"), strict=True):
        for denoiser, by_rate in results.items():
            found = [each.interval(name, seed) for each in by_rate.values()]
            means = [100 * each.mean for each in found]
            errors = [
                [100 * (each.mean - each.low) for each in found],
                [100 * (each.high - each.mean) for each in found],
            ]
            axes.errorbar([100 * rate for rate in by_rate], means, errors, fmt="o-", capsize=3, label=denoiser)
        axes.set_xlabel("hidden tokens of a block, %")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
