"""The results of canvas decoding."""

from __future__ import annotations

from dataclasses import dataclass, field


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
class CanvasCompletion:
    """The answer to one prompt.

    Attributes:
        tokens: the new tokens, including the stop token if one ended the row.
        text: the text of the answer, up to a stop string. It is None without a tokenizer.
        finish_reason: "stop", "length", or "error" for a canvas whose logits were not finite.
        error: what ended the request if it failed.
        steps: the number of denoising steps of each canvas.
        canvases: if the call traces, the steps of each canvas.
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    error: BaseException | None = None
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
