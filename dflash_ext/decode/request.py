"""A prompt on its way through the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .completion import Completion


@dataclass(eq=False)
class Request:
    """What `Engine.submit` returns.

    Attributes:
        completion: the answer so far; complete when `done`.
        on_tokens: called with newly committed tokens, cycle by cycle.
        on_finish: called with the completion when the request ends.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    options: dict[str, float]
    stops: frozenset[int]
    seed: int
    on_tokens: Callable[[list[int]], None] | None = None
    on_finish: Callable[[Completion], None] | None = None
    completion: Completion = field(default_factory=Completion)
    slot: int | None = None

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def commit_cycle(self, drafted: list[int], accepted: int, bonus: int) -> None:
        """Adds what a cycle has committed: the first `accepted` of the `drafted` tokens, and the bonus token."""
        self.completion.verified.append(len(drafted))
        self.completion.accepted.append(accepted)
        self.completion.drafted.append(drafted)
        self.commit([*drafted[:accepted], bonus], in_cycle=True)

    def commit(self, tokens: list[int], *, in_cycle: bool = False) -> None:
        """Adds tokens up to a stop token, and ends the request there or at its largest length."""
        completion = self.completion
        stop = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        completion.tokens += tokens
        if in_cycle:
            completion.committed.append(len(tokens))
        if stop is not None:
            completion.finish_reason = "stop"
        elif len(completion.tokens) == self.max_new_tokens:
            completion.finish_reason = "length"
        if self.on_tokens:
            self.on_tokens(tokens)
        if self.done and self.on_finish:
            self.on_finish(completion)
