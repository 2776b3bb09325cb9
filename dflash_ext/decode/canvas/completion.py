"""The results of canvas decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..completion import Answer


@dataclass(frozen=True)
class Step:
    """One denoising step of a canvas.

    canvas: the tokens that the next step reads.
    accepted: the positions that the step took over: those that it revealed, or in uniform-state diffusion those that it
        did not fill with new noise.
    best: the likeliest tokens; what the step would commit. In masked diffusion they are the canvas.
    """

    canvas: list[int]
    accepted: list[bool]
    best: list[int]


@dataclass
class CanvasCompletion(Answer):
    """The answer to one prompt, canvas by canvas. It is an error if the logits of a canvas were not finite.

    Attributes:
        steps: the number of denoising steps of each canvas.
        canvases: if the call traces, the steps of each canvas.
    """

    steps: list[int] = field(default_factory=list)
    canvases: list[list[Step]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens by denoising step."""
        return len(self.tokens) / sum(self.steps) if self.steps else 0.0


@dataclass
class CanvasDecoded:
    """The completions of a call, in the order of its prompts.

    Attributes:
        steps: the number of denoising forwards, each for a whole batch.
        prefill_seconds: the time in which prompts were read.
        capture_seconds: that in which CUDA graphs were made.
        decode_seconds: that of everything else.
    """

    completions: list[CanvasCompletion]
    steps: int = 0
    prefill_seconds: float = 0.0
    capture_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of decoding, without prefill."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0
