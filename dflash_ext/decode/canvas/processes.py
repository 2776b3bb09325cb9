"""The two kinds of diffusion: what a canvas starts from, what a step takes over, and when a canvas is done.

A process is its settings. Its methods change `Rows` on the device and read no host value, so that a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...checks import check_numbers, is_int, shown
from ...ops import reveal, reveal_count
from ...ops.logits import by_row
from .randomness import Randomness
from .rows import Rows

SCHEDULES = ("linear", "cosine")
ORDERS = ("left_to_right", "confidence", "margin", "entropy")
_LIMITS = ("threshold", "at_least", "factor", "entropy_bound")


@dataclass(frozen=True)
class MaskedDiffusion:
    """A canvas starts from mask tokens, and each step reveals some positions, which keep their tokens.

    Attributes:
        steps: the number of steps in which a schedule reveals a canvas. The other limits reveal at least one position
            in a step, so that they need no number of steps.
        schedule: "linear" reveals equal shares, "cosine" few positions at first and many in the last steps (MaskGIT,
            arXiv 2202.04200). None, if one of the other limits is given.
        order: which masked positions come first. "left_to_right"; or the surest, by "confidence" (the drawn token's
            probability at temperature 1, as in MaskGIT and LLaDA), by "margin" (the difference of the two largest
            probabilities) or by "entropy" (the lowest first).
        threshold, at_least, factor, entropy_bound: limits in the place of a schedule, as those of `ops.reveal`.
        temperature, top_k, top_p, min_p: of the draws, as in `ops.sample`. Temperature 0 takes the likeliest tokens.

    Raises:
        ValueError: a value is not supported, or not exactly one of the schedule and the limits is given.
        TypeError: a value is of another kind.
    """

    steps: int = 16
    schedule: str | None = "linear"
    order: str = "confidence"
    threshold: float | None = None
    at_least: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        check_numbers("MaskedDiffusion", **{name: getattr(self, name) for name in (*_LIMITS, *self._filters)})
        _check_integers(steps=self.steps, **{} if self.top_k is None else {"top_k": self.top_k})
        _check_steps(self.steps)
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}; {', '.join(ORDERS)} are supported")
        if self.schedule not in (*SCHEDULES, None):
            raise ValueError(f"schedule is {self.schedule!r}; {', '.join(SCHEDULES)} and None are supported")
        given = [name for name in ("schedule", *_LIMITS) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{', '.join(given) or 'no limit'} given; exactly one of schedule, {', '.join(_LIMITS)} is needed"
            )
        if self.order != "confidence" and given[0] in ("threshold", "at_least", "factor"):
            raise ValueError(f"{given[0]} is a limit of the confidence; order is {self.order!r}")
        for name in ("threshold", "at_least"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; a probability, from 0 to 1, is needed")
        by_row("MaskedDiffusion", (), **self._filters, **{name: getattr(self, name) for name in _LIMITS})

    @property
    def _filters(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}

    def steps_before_end(self, masked: int) -> int:
        """The number of steps before which no canvas with so many masked positions can be done."""
        return self.steps if self.schedule and masked >= self.steps else 1

    def begin(self, rows: Rows, mask_id: int, vocab_size: int, randomness: Randomness) -> None:
        """Fills canvases with mask tokens."""
        rows.canvas = torch.full_like(rows.canvas, mask_id)
        self.begin_from(rows, mask_id)

    def begin_from(self, rows: Rows, mask_id: int) -> None:
        """Begins with the canvases that rows have: their mask tokens are replaced, and their other tokens stay."""
        rows.masked = (rows.canvas == mask_id) & rows.live
        rows.total = rows.masked.sum(-1)
        _restart(rows)
        rows.best = rows.canvas
        rows.running = rows.total > 0

    def step(self, rows: Rows, logits: Tensor, changes: dict, randomness: Randomness) -> None:
        """One step with the logits [N, L, V]. changes: arguments of `ops.sample` that change them before the draw."""
        drawn, confidence = randomness.sample(logits, rows, return_confidence=True, **changes, **self._filters)
        scores = {"left_to_right": None, "confidence": confidence, "margin": drawn.margin, "entropy": -drawn.entropy}
        limit = {name: getattr(self, name) for name in _LIMITS}
        if self.schedule:
            limit["count"] = reveal_count(rows.total, rows.step, self.steps, schedule=self.schedule)
        masked = rows.masked & rows.running[:, None]
        entropy = drawn.entropy if self.entropy_bound is not None else None
        rows.accepted = reveal(scores[self.order], masked, entropy=entropy, **limit)
        rows.finite = rows.finite & (drawn.max_prob.isfinite() | ~rows.live).all(-1)
        rows.canvas = rows.best = torch.where(rows.accepted, drawn.token, rows.canvas)
        rows.masked = rows.masked & ~rows.accepted
        rows.step = rows.step + rows.running
        rows.running = rows.running & rows.masked.any(-1)


@dataclass(frozen=True)
class UniformDiffusion:
    """A canvas starts from uniform tokens. Each step draws all of it anew, and keeps the positions of little entropy.

    The rule is that of DiffusionGemma. Positions are taken in the order of their entropy while the sum of the entropies
    before them is at most the bound (arXiv 2505.24857), and all others get new uniform tokens. A position that was
    taken may be lost again. What is committed in the end is the likeliest token of each position.

    Attributes:
        steps: the largest number of steps on a canvas.
        entropy_bound: in nats.
        t_min, t_max: the temperature falls from t_max in the first step towards t_min, in equal differences.
        stability: a canvas may be done when its likeliest tokens have stayed the same for so many steps ...
        confidence: ... and the mean entropy of its positions, in nats, is less than this. None makes all steps.

    Raises:
        ValueError: a number is out of its range.
        TypeError: a value is no number.
    """

    steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability: int = 1
    confidence: float | None = 0.005

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("entropy_bound", "t_min", "t_max")}
        check_numbers("UniformDiffusion", needed=numbers, confidence=self.confidence)
        _check_integers(steps=self.steps, stability=self.stability)
        _check_steps(self.steps)
        if not self.entropy_bound >= 0:
            raise ValueError(f"entropy_bound is {self.entropy_bound}; a number of at least 0 is needed")
        if not 0 < self.t_min <= self.t_max:
            raise ValueError(f"t_min is {self.t_min} and t_max {self.t_max}; 0 < t_min <= t_max is needed")
        if self.stability < 0:
            raise ValueError(f"stability is {self.stability}; a number of at least 0 is needed")
        if self.confidence is not None and not self.confidence >= 0:
            raise ValueError(f"confidence is {self.confidence}; a number of at least 0, or None, is needed")

    def steps_before_end(self, masked: int) -> int:
        """The number of steps before which no canvas can be done."""
        return self.steps if self.confidence is None else min(self.steps, self.stability + 1)

    def begin(self, rows: Rows, mask_id: None, vocab_size: int, randomness: Randomness) -> None:
        """Fills canvases with uniform tokens."""
        rows.step = torch.zeros_like(rows.step)
        rows.canvas = randomness.noise(rows, vocab_size)
        self.begin_from(rows, mask_id)

    def begin_from(self, rows: Rows, mask_id: None) -> None:
        """Begins with the canvases that rows have. All of their tokens may be replaced."""
        _restart(rows)
        rows.best = torch.full_like(rows.canvas, -1)
        rows.running = rows.length > 0

    def step(
        self, rows: Rows, logits: Tensor, changes: dict, randomness: Randomness, embedding: Tensor | None = None
    ) -> Tensor | None:
        """One step with the logits [N, L, V]. changes: arguments of `ops.sample` that change them before the draw.

        With an embedding [V, H] it returns the expected embeddings of the logits at the step's temperature, [N, L, H].
        """
        live, running = rows.live, rows.running[:, None]
        temperature = self.temperature(rows)[:, None].expand(live.shape)
        options, expected = {"temperature": temperature, **changes}, None
        if embedding is None:
            drawn = randomness.sample(logits, rows, **options)
        else:
            drawn, expected = randomness.sample_and_embed(logits, embedding, rows, **options)
        rows.accepted = running & reveal(-drawn.entropy, live, entropy=drawn.entropy, entropy_bound=self.entropy_bound)
        rows.finite = rows.finite & (drawn.max_prob.isfinite() | ~live).all(-1)
        same = ((drawn.argmax == rows.best) | ~live).all(-1)
        entropy = drawn.entropy.masked_fill(~live, 0.0).sum(-1) / rows.length.clamp(min=1)
        rows.step = rows.step + rows.running
        rows.stable = torch.where(same, rows.stable + 1, 0)
        noise = randomness.noise(rows, logits.shape[-1])
        rows.canvas = torch.where(rows.accepted, drawn.token, torch.where(running, noise, rows.canvas))
        rows.best = torch.where(running, drawn.argmax, rows.best)
        ended = rows.step >= self.steps
        if self.confidence is not None:
            ended = ended | ((rows.stable >= self.stability) & (entropy < self.confidence))
        rows.running = rows.running & ~ended
        return expected

    def temperature(self, rows: Rows) -> Tensor:
        """The temperature of the next step, float32 [N]."""
        return self.t_min + (self.t_max - self.t_min) * ((self.steps - rows.step) / self.steps)


def process_of(
    kind: type[MaskedDiffusion] | type[UniformDiffusion], settings: Mapping[str, Any]
) -> MaskedDiffusion | UniformDiffusion:
    """A process with these settings, as a user wrote them in JSON.

    Raises:
        ValueError, TypeError: the settings are no mapping, one of them does not exist, or as the process.
    """
    known = [each.name for each in fields(kind)]
    if not isinstance(settings, Mapping):
        raise ValueError(f'settings in braces are needed, as {{"{known[0]}": ...}}')
    for name in settings:
        if name not in known:
            raise ValueError(f"there is no setting '{name}': {', '.join(known)} exist")
    return kind(**settings)


def _restart(rows: Rows) -> None:
    rows.step, rows.stable = torch.zeros_like(rows.step), torch.zeros_like(rows.stable)
    rows.accepted, rows.finite = torch.zeros_like(rows.accepted), torch.ones_like(rows.finite)
    if rows.soft is not None:
        rows.soft = torch.zeros_like(rows.soft)


def _check_integers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not is_int(value):
            raise TypeError(f"{name} is {shown(value)}; an integer is needed")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one is needed")
