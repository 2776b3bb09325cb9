"""One denoiser decoded under several samplers: how much of what it writes is due to how it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..decode import decode
from ..decode.canvas import MaskedDiffusion, decode_canvas
from ..models import Denoiser, Target, stop_tokens
from .metrics import Interval, answer_nll, as_json, bigram_repetition, distinct, filler_rate, interval, resamples

# The nine variants of the build log. Its linear and cosine schedules reveal from left to right.
VARIANTS = {
    "A_baseline": MaskedDiffusion(),
    "B_temp_low": MaskedDiffusion(temperature=0.7),
    "C_topp_90": MaskedDiffusion(top_p=0.9),
    "D_temp07_topp90": MaskedDiffusion(temperature=0.7, top_p=0.9),
    "E_linear_reveal": MaskedDiffusion(order="left_to_right"),
    "F_cosine_reveal": MaskedDiffusion(order="left_to_right", schedule="cosine"),
    "G_8_steps": MaskedDiffusion(steps=8),
    "H_32_steps": MaskedDiffusion(steps=32),
    "I_argmax": MaskedDiffusion(temperature=0.0),
    # The cosine schedule in MaskGIT's sense: the surest positions first.
    "maskgit_cosine": MaskedDiffusion(schedule="cosine"),
}
BASE = "base, token by token"  # plain decoding of the base at temperature 1, for comparison
FIGURES = {
    "filler": "characters that are commas, digits or white space",
    "repetition": "pairs of neighbouring tokens that the answer has had before",
    "distinct_2": "different pairs of neighbouring tokens among all of them",
    "nll": "nats a token under the base",
}


@dataclass(frozen=True)
class AblationPrompt:
    """A text to go on with, or with a suffix, a gap to fill in.

    Attributes:
        kind: such as narrative, code, infill or question; figures are also given by kind.
    """

    kind: str
    prompt: str
    suffix: str = ""


# One of each of the build log's kinds.
PROMPTS = (
    AblationPrompt("narrative", "Once upon a time, in a village between two rivers, there lived a child who"),
    AblationPrompt("code", "def fib(n):\n    "),
    AblationPrompt(
        "infill",
        "Two cells that are captured in one droplet are called a doublet. Doublets are a problem because",
        " For this reason they are removed before the data are analysed.",
    ),
    AblationPrompt(
        "question",
        "Question: What happened at the end of the Cretaceous, when 75% of all species died out?\n"
        "Answer: The extinction was caused by",
    ),
)


@dataclass(frozen=True)
class Sample:
    """What a variant wrote for a prompt, and its figures."""

    prompt: AblationPrompt
    text: str
    tokens: list[int]
    filler: float
    repetition: float
    nll: float


def ablate(
    denoiser: Denoiser,
    base: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[AblationPrompt] = PROMPTS,
    variants: Mapping[str, MaskedDiffusion] = VARIANTS,
    *,
    canvas_length: int = 96,
    max_new_tokens: int = 96,
    samples: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Sample]]:
    """Lets a denoiser go on with prompts under each variant, and the base token by token.

    Args:
        denoiser: as the canvas loop takes it.
        base: the denoiser's base, whose likelihood judges the answers.
        samples: answers to each prompt, with different seeds. Variants share seeds.
        canvas_length, max_new_tokens, batch_size: as in `decode_canvas`.

    Returns:
        By variant, the answers: all to the first prompt, then all to the next one. An answer goes to its first end
        token. Of a gap it is what was filled in.

    Raises:
        ValueError: the denoiser is one of uniform noise, a suffix leaves no room in the canvas, or as `decode_canvas`.
    """
    if denoiser.mask_id is None:
        raise ValueError("a denoiser of uniform noise has no mask token: the variants are samplers of masked tokens")
    asked = [prompt for prompt in prompts for _ in range(samples)]
    ids = [tokenizer(prompt.prompt)["input_ids"] for prompt in asked]
    ends = stop_tokens(tokenizer, base.model)
    canvases = [_canvas(prompt, tokenizer, denoiser.mask_id, canvas_length) for prompt in asked]
    seeds = list(range(seed, seed + len(asked)))
    found = {}
    for name, process in variants.items():
        on_progress(name)
        decoded = decode_canvas(
            denoiser,
            ids,
            process,
            canvas_length=canvas_length,
            max_new_tokens=max_new_tokens,
            canvases=canvases,
            seed=seeds,
            batch_size=batch_size,
        )
        answers = [completion.tokens for completion in decoded.completions]
        found[name] = _judged(base, tokenizer, asked, ids, answers, canvases, ends)
    on_progress(BASE)
    decoded = decode(
        base,
        None,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        stop_token_ids=ends,
        batch_size=batch_size,
        seed=seed,
    )
    answers = [completion.tokens for completion in decoded.completions]
    found[BASE] = _judged(base, tokenizer, asked, ids, answers, [None] * len(asked), ends)
    return found


def _canvas(prompt: AblationPrompt, tokenizer: PreTrainedTokenizerBase, mask_id: int, length: int) -> list[int] | None:
    """The first canvas of a prompt with a suffix: a gap of mask tokens, and the suffix."""
    if not prompt.suffix:
        return None
    suffix = tokenizer(prompt.suffix, add_special_tokens=False)["input_ids"]
    if len(suffix) >= length:
        raise ValueError(f"a suffix of {len(suffix)} tokens leaves no gap in a canvas of {length} tokens")
    return [mask_id] * (length - len(suffix)) + suffix


def _judged(base, tokenizer, asked, ids, answers, canvases, ends) -> list[Sample]:
    written = [
        _until_end(answer[: len(answer) if canvas is None else canvas.count(canvas[0])], ends)
        for answer, canvas in zip(answers, canvases, strict=True)
    ]
    likelihoods = answer_nll(base, ids, written)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
    return [
        Sample(prompt, text, tokens, filler_rate(text), bigram_repetition(tokens), nll)
        for prompt, text, tokens, nll in zip(asked, texts, written, likelihoods, strict=True)
    ]


def _until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first end token."""
    at = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:at])


def figures(found: Mapping[str, Sequence[Sample]], seed: int = 0) -> dict:
    """The figures of each variant, ready for JSON: over all answers with an interval, and by kind of prompt."""
    return as_json({name: _of(samples, seed) | {"kinds": _by_kind(samples)} for name, samples in found.items()})


def _of(samples: Sequence[Sample], seed: int = 0) -> dict:
    import torch

    rows = torch.tensor([[each.filler, each.repetition, each.nll] for each in samples], dtype=torch.float64)
    weights = resamples(len(rows), seed)
    told = {}
    for column, name in enumerate(("filler", "repetition", "nll")):
        known = rows[:, column].isfinite()
        drawn = (weights[:, known] @ rows[known, column]) / weights[:, known].sum(1)
        told[name] = interval(float(rows[known, column].mean()), drawn)._asdict()
    tokens = [each.tokens for each in samples]
    return told | {f"distinct_{n}": distinct(tokens, n) for n in (1, 2, 3)}


def _by_kind(samples: Sequence[Sample]) -> dict:
    kinds = dict.fromkeys(each.prompt.kind for each in samples)
    return {
        kind: {
            name: _mean(getattr(each, name) for each in samples if each.prompt.kind == kind)
            for name in ("filler", "repetition", "nll")
        }
        for kind in kinds
    }


def _mean(values: Iterable[float]) -> float:
    """The mean of what is known: the likelihood of an empty answer is NaN."""
    known = [value for value in values if not isnan(value)]
    return fmean(known) if known else nan


def table(found: Mapping[str, Sequence[Sample]], seed: int = 0) -> Table:
    """A row for each variant."""
    caption = "\n".join(f"{name}: {meaning}" for name, meaning in FIGURES.items())
    caption = f"{caption}\n±: 95% of a bootstrap over answers"
    view = Table(box=SIMPLE, pad_edge=False, caption=caption, caption_justify="left")
    view.add_column("variant", overflow="fold", min_width=16)
    for column in FIGURES:
        view.add_column(column, justify="right", no_wrap=True)
    for name, samples in found.items():
        of = _of(samples, seed)
        told = {key: Interval(**of[key]).shown(".3f") for key in ("filler", "repetition", "nll")}
        view.add_row(name, told["filler"], told["repetition"], f"{of['distinct_2']:.3f}", told["nll"])
    return view


def shown_samples(found: Mapping[str, Sequence[Sample]]) -> str:
    """One answer of each variant to each prompt, as Markdown."""
    prompts = list(dict.fromkeys(each.prompt for samples in found.values() for each in samples))
    lines = []
    for prompt in prompts:
        lines += [f"## {prompt.kind}", "", f"> {prompt.prompt!r} ... {prompt.suffix!r}", ""]
        for name, samples in found.items():
            first = next(each for each in samples if each.prompt == prompt)
            lines += [f"- **{name}** (filler {first.filler:.2f}): {first.text!r}"]
        lines.append("")
    return "\n".join(lines)


def plot_ablation(found: Mapping[str, Sequence[Sample]], path: str | Path, seed: int = 0) -> None:
    """Draws the filler rate of each variant with its interval, and the likelihood under the base beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    told = {name: _of(samples, seed) for name, samples in found.items()}
    names = list(told)
    pane, panels = pyplot.subplots(1, 2, figsize=(10, 0.4 * len(names) + 1.2), layout="constrained", sharey=True)
    for axes, figure, label in zip(
        panels, ("filler", "nll"), ("filler rate", "nats a token under the base"), strict=True
    ):
        means = [told[name][figure]["mean"] for name in names]
        errors = [
            [told[name][figure]["mean"] - told[name][figure]["low"] for name in names],
            [told[name][figure]["high"] - told[name][figure]["mean"] for name in names],
        ]
        axes.barh(names, means, xerr=errors, capsize=2)
        axes.set_xlabel(label)
    panels[0].invert_yaxis()
    pane.savefig(path, dpi=100)
    pyplot.close(pane)
