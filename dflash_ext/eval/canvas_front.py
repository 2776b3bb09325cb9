"""Quality and speed of canvas decoding by the number of its steps, beside the base that decodes token by token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode import decode
from ..decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from ..models import Denoiser, DFlashDrafter, Target
from .metrics import Interval, answer_nll, as_json, bigram_repetition, filler_rate, is_right, mean_interval

BASE = "base, token by token"


@dataclass(frozen=True)
class Point:
    """A way of decoding, and what it gave.

    Attributes:
        answers: the text of each prompt's answer.
        tokens_per_forward: committed tokens by forwards of a row. A canvas is also read once when it is committed,
            which is not counted.
        tokens_per_second: without prefill, over all rows that are decoded at a time.
        nlls: nats a token under the base of each answer; empty without a base, and NaN for an empty answer.
        right: whether each answer ends with the right number; empty if no right answers were given.
        repetition, filler: means over the answers, as in `eval.metrics`.
    """

    answers: list[str]
    tokens_per_forward: float
    tokens_per_second: float
    nlls: list[float]
    right: list[bool]
    repetition: float
    filler: float

    @property
    def nll(self) -> Interval | None:
        """The mean of `nlls`, with its bootstrap interval over prompts; None without a base."""
        return mean_interval(self.nlls)

    @property
    def exact(self) -> Interval | None:
        """The share of right answers, with its bootstrap interval over prompts; None if it is not known."""
        return mean_interval(self.right)


@dataclass(frozen=True)
class Judged:
    """What is decoded, and what judges it.

    Attributes:
        prompts: token ids.
        base: a causal LM that judges the answers; None for a model without one (DiffusionGemma).
        references: the right answer to each prompt, of which the last number counts; empty if there are none.
        max_new_tokens, stop_token_ids, batch_size, seed: as in `decode_canvas`.
    """

    prompts: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    base: Target | None = None
    references: Sequence[str] = ()
    max_new_tokens: int = 256
    stop_token_ids: Sequence[int] = ()
    batch_size: int = 8
    seed: int = 0

    @property
    def options(self) -> dict:
        names = "max_new_tokens", "stop_token_ids", "batch_size", "seed"
        return {name: getattr(self, name) for name in names}

    def point(self, answers: Sequence[Sequence[int]], **speed: float) -> Point:
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        return Point(
            texts,
            nlls=answer_nll(self.base, self.prompts, answers) if self.base else [],
            right=[is_right(*pair) for pair in zip(texts, self.references, strict=True)] if self.references else [],
            repetition=fmean(map(bigram_repetition, answers)),
            filler=fmean(map(filler_rate, texts)),
            **speed,
        )


def canvas_points(
    model: Denoiser | PreTrainedModel,
    judged: Judged,
    processes: Mapping[str, MaskedDiffusion | UniformDiffusion],
    *,
    canvas_length: int | None = None,
    drafter: DFlashDrafter | None = None,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Point]:
    """Decodes the prompts by each process; the model and the drafter are those that `decode_canvas` takes."""
    points = {}
    for name, process in processes.items():
        on_progress(name)
        decoded = decode_canvas(
            model, judged.prompts, process, canvas_length=canvas_length, drafter=drafter, **judged.options
        )
        forwards = sum(sum(completion.steps) for completion in decoded.completions)
        speed = {"tokens_per_forward": decoded.tokens / forwards, "tokens_per_second": decoded.tokens_per_second}
        points[name] = judged.point([completion.tokens for completion in decoded.completions], **speed)
    return points


def base_points(
    judged: Judged, temperatures: Sequence[float] = (1.0,), *, on_progress: Callable[[str], None] = lambda name: None
) -> dict[str, Point]:
    """Decodes the prompts token by token by the base, at each temperature."""
    points = {}
    for temperature in temperatures if judged.base else ():
        name = BASE if len(temperatures) == 1 else f"{BASE}, temperature {temperature:g}"
        on_progress(name)
        plain = decode(judged.base, None, judged.prompts, temperature=temperature, **judged.options)
        speed = {"tokens_per_forward": 1.0, "tokens_per_second": plain.tokens_per_second}
        points[name] = judged.point([completion.tokens for completion in plain.completions], **speed)
    return points


def figures(points: Mapping[str, Point]) -> dict:
    """The points, ready for JSON: NaN is null, and an interval has its mean, low and high."""
    told = {}
    for name, point in points.items():
        means = {of: interval and interval._asdict() for of, interval in _intervals(point).items()}
        told[name] = as_json(means | asdict(point))
    return told


def table(points: Mapping[str, Point]) -> Table:
    """A row for each point."""
    caption = (
        "a step, a second: tokens; nll: nats a token under the base; right: answers with\n"
        "the right number; ±: 95% of a bootstrap over prompts; repeated: pairs of tokens that the\n"
        "answer has had before; filler: characters that are commas, digits or white space"
    )
    view = Table(box=SIMPLE, pad_edge=False, caption=caption, caption_justify="left")
    view.add_column("", overflow="fold", min_width=14)
    for column in ("a step", "a second", "nll", "right", "repeated", "filler"):
        view.add_column(column, justify="right", no_wrap=True)
    for name, point in points.items():
        speed = f"{point.tokens_per_forward:.2f}", f"{point.tokens_per_second:.0f}"
        nll, exact = _shown(point.nll, ".2f"), _shown(point.exact, ".0%")
        view.add_row(name, *speed, nll, exact, f"{point.repetition:.2f}", f"{point.filler:.2f}")
    return view


def plot_front(points: Mapping[str, Point], path: str | Path) -> None:
    """Draws likelihood under the base, or without one repetition, against tokens per second.

    Points that differ in the number of steps alone are joined.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    is_judged = all(point.nll for point in points.values())
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    fronts: dict[str, dict[str, Point]] = {}
    for name, point in points.items():
        steps = re.search(r"\d+ steps", name)
        rest = ", ".join(part for part in name.split(", ") if not (steps and part == steps[0]))
        fronts.setdefault(rest or "canvases", {})[steps[0] if steps else ""] = point
    for name, of_steps in fronts.items():
        front = list(of_steps.values())
        speeds = [point.tokens_per_second for point in front]
        heights = [point.nll.mean if is_judged else point.repetition for point in front]
        [line] = axes.plot(speeds, heights, "s" if name.startswith(BASE) else "o-", label=name)
        for steps, speed, height in zip(of_steps, speeds, heights, strict=True):
            axes.annotate(steps, (speed, height), xytext=(3, 3), textcoords="offset points", fontsize=7)
        if is_judged:
            lows, highs = [point.nll.low for point in front], [point.nll.high for point in front]
            axes.vlines(speeds, lows, highs, color=line.get_color(), linewidth=0.8)
    axes.set_xlabel("tokens per second, without prefill")
    axes.set_ylabel("nats a token under the base" if is_judged else "pairs of tokens that the answer has had before")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _intervals(point: Point) -> dict[str, Interval | None]:
    return {"nll": point.nll, "exact": point.exact}


def _shown(interval: Interval | None, form: str) -> str:
    return "-" if interval is None else interval.shown(form)
