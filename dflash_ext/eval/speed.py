"""Times several ways of decoding the same prompts, one after another for each prompt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..models import Target

GENERATE, PLAIN, SPECULATIVE = "transformers generate", "plain", "speculative"


@dataclass(frozen=True)
class Timed:
    """The answers of one way of decoding, as token ids, and the seconds that each took, its prompt included."""

    answers: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.answers)) / sum(self.seconds)

    def speedup(self, other: Timed) -> float:
        """How often this way is as fast as the other one: the median over the prompts of the ratio in time a token."""
        each = (
            (theirs / len(their_answer)) / (mine / len(answer))
            for mine, answer, theirs, their_answer in zip(
                self.seconds, self.answers, other.seconds, other.answers, strict=True
            )
        )
        return statistics.median(each)


def take_turns(
    ways: Mapping[str, Callable[[list[int]], list[int]]], prompts: Sequence[list[int]], device: torch.device
) -> dict[str, Timed]:
    """Decodes each prompt in all ways before the next prompt, so that what else a machine does slows all ways alike.

    Args:
        ways: by name, what takes the token ids of a prompt to those of its answer. Their order is reversed for every
            other prompt. A way should have been called once before, because first calls take longer.
    """
    timed = {name: Timed() for name in ways}
    for number, prompt in enumerate(prompts):
        for name in reversed(list(ways)) if number % 2 else ways:
            began = time.perf_counter()
            answer = ways[name](prompt)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            timed[name].seconds.append(time.perf_counter() - began)
            timed[name].answers.append(answer)
    return timed


def transformers_generate(
    target: Target, *, max_new_tokens: int, stop_token_ids: Sequence[int]
) -> Callable[[list[int]], list[int]]:
    """Greedy decoding by transformers' own `generate` with its default cache, as a way for `take_turns`."""

    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=target.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
        options["eos_token_id"] = list(stop_token_ids) or None
        return target.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    return generate
