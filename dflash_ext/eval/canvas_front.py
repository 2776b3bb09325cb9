"""Quality and speed of canvas decoding by the number of its steps, beside the base that decodes token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode import decode
from ..decode.canvas import MaskedDiffusion, UniformDiffusion, decode_canvas
from ..models import Denoiser, Target
from .metrics import answer_nll, bigram_repetition, filler_rate

BASE = "base, token by token"


@dataclass(frozen=True)
class Point:
    """A way of decoding, and what it gave.

    Attributes:
        answers: the text of each prompt's answer.
        tokens_per_forward: committed tokens by forwards of a row. A canvas is also read once when it is committed,
            which is not counted.
        tokens_per_second: without prefill, over all rows that are decoded at a time.
        nll: nats a token under the base, the mean over the answers; NaN without a base.
        repetition, filler: means over the answers, as in `eval.metrics`.
    """

    answers: list[str]
    tokens_per_forward: float
    tokens_per_second: float
    nll: float
    repetition: float
    filler: float

    @classmethod
    def of(
        cls,
        base: Target | None,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        **speed: float,
    ) -> Point:
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        likelihoods = [nll for nll in answer_nll(base, prompts, answers) if nll == nll] if base else []
        return cls(
            texts,
            nll=fmean(likelihoods) if likelihoods else math.nan,
            repetition=fmean(map(bigram_repetition, answers)),
            filler=fmean(map(filler_rate, texts)),
            **speed,
        )


def canvas_front(
    model: Denoiser | PreTrainedModel,
    base: Target | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    processes: Mapping[str, MaskedDiffusion | UniformDiffusion],
    *,
    temperature: float = 1.0,
    canvas_length: int | None = None,
    max_new_tokens: int = 256,
    stop_token_ids: Sequence[int] = (),
    batch_size: int = 8,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Point]:
    """Decodes the same prompts by each process, and token by token by the base.

    Args:
        model: as `decode_canvas` takes it.
        base: a causal LM that judges the answers; None for a model without one (DiffusionGemma).
        temperature: of the base's own decoding.
        canvas_length, max_new_tokens, stop_token_ids, batch_size, seed: as in `decode_canvas`.
    """
    points = {}
    for name, process in processes.items():
        on_progress(name)
        decoded = decode_canvas(
            model,
            prompts,
            process,
            canvas_length=canvas_length,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            batch_size=batch_size,
            seed=seed,
        )
        answers = [completion.tokens for completion in decoded.completions]
        forwards = sum(sum(completion.steps) for completion in decoded.completions)
        speed = {"tokens_per_forward": decoded.tokens / forwards, "tokens_per_second": decoded.tokens_per_second}
        points[name] = Point.of(base, tokenizer, prompts, answers, **speed)
    if base is not None:
        on_progress(BASE)
        options = {"max_new_tokens": max_new_tokens, "stop_token_ids": stop_token_ids, "temperature": temperature}
        plain = decode(base, None, prompts, batch_size=batch_size, seed=seed, **options)
        answers = [completion.tokens for completion in plain.completions]
        speed = {"tokens_per_forward": 1.0, "tokens_per_second": plain.tokens_per_second}
        points[BASE] = Point.of(base, tokenizer, prompts, answers, **speed)
    return points


def figures(points: Mapping[str, Point]) -> dict:
    """The points, ready for JSON: NaN is null."""
    told = {name: asdict(point) for name, point in points.items()}
    for point in told.values():
        point["nll"] = None if math.isnan(point["nll"]) else point["nll"]
    return told


def table(points: Mapping[str, Point]) -> Table:
    """A row for each point."""
    view = Table(box=SIMPLE, caption="nll: nats a token under the base", caption_justify="left")
    view.add_column("", no_wrap=True)
    for column in ("tokens/forward", "tokens/s", "nll", "repetition", "filler"):
        view.add_column(column, justify="right", no_wrap=True)
    for name, point in points.items():
        nll = "-" if math.isnan(point.nll) else f"{point.nll:.3f}"
        speed = f"{point.tokens_per_forward:.2f}", f"{point.tokens_per_second:.1f}"
        view.add_row(name, *speed, nll, f"{point.repetition:.3f}", f"{point.filler:.3f}")
    return view


def plot_front(points: Mapping[str, Point], path: str | Path) -> None:
    """Draws each point: its likelihood under the base, or without one its repetition, against tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    is_judged = not any(math.isnan(point.nll) for point in points.values())
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name, point in points.items():
        height = point.nll if is_judged else point.repetition
        axes.plot(point.tokens_per_second, height, "s" if name == BASE else "o", label=name)
    axes.set_xlabel("tokens per second, without prefill")
    axes.set_ylabel("nats a token under the base" if is_judged else "pairs of tokens that the answer has had before")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
