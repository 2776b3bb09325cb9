"""A prompt on its way through the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .completion import Completion
from .pace import RowPace
from .state import OFF
from .text import Text


@dataclass(eq=False)
class Request:
    """What `Engine.submit` returns.

    Attributes:
        options: the temperature, filters and penalties. bias: what is added to the logits of some tokens.
        completion: the answer so far; complete when `done`.
        text: makes the answer's text, if the engine has a tokenizer.
        on_tokens, on_text: called with newly committed tokens and with the text that they add, cycle by cycle.
        on_finish: called with the completion when the request ends.
        decoded: the number of tokens that were decoded. The completion may have fewer, if a stop string ended it, or if
            the last ones may be the beginning of one.
        pace: what was accepted of its drafts.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    options: dict[str, float]
    bias: dict[int, float]
    stops: frozenset[int]
    seed: int
    text: Text | None = None
    on_tokens: Callable[[list[int]], None] | None = None
    on_text: Callable[[str], None] | None = None
    on_finish: Callable[[Completion], None] | None = None
    completion: Completion = field(default_factory=Completion)
    slot: int | None = None
    decoded: int = 0
    pace: RowPace = field(default_factory=RowPace)

    @cached_property
    def uses(self) -> frozenset[str]:
        """The options that are not off, and "logit_bias" if there is one."""
        used = {name for name, value in self.options.items() if value != OFF[name]}
        return frozenset(used | ({"logit_bias"} if self.bias else set()))

    @property
    def left(self) -> int:
        """The number of tokens that may yet be decoded."""
        return self.max_new_tokens - self.decoded

    @property
    def done(self) -> bool:
        return self.completion.finish_reason is not None

    def commit_cycle(self, drafted: list[int], accepted: int, bonus: int) -> None:
        """Adds what a cycle has committed: the first `accepted` of the `drafted` tokens, and the bonus token."""
        completion = self.completion
        completion.verified.append(len(drafted))
        completion.accepted.append(accepted)
        completion.drafted.append(drafted)
        self.commit([*drafted[:accepted], bonus], in_cycle=True)

    def commit(self, tokens: list[int], *, in_cycle: bool = False) -> None:
        """Adds tokens up to a stop token or stop string, and ends the request there or at its largest length."""
        stops = not self.stops.isdisjoint(tokens)
        if stops:
            tokens = tokens[: 1 + next(i for i, token in enumerate(tokens) if token in self.stops)]
        if self.text is not None:
            tokens = tokens[: self.text.add(tokens)]
            stops = stops or self.text.stopped
        self.decoded += len(tokens)
        if in_cycle:
            self.completion.committed.append(len(tokens))
        ended = stops or self.decoded == self.max_new_tokens
        if ended:
            self.completion.finish_reason = "stop" if stops else "length"
            if self.text is not None:
                self.text.finish()
        tokens, text = self._add(tokens)
        if tokens and self.on_tokens:
            self.on_tokens(tokens)
        if text and self.on_text:
            self.on_text(text)
        if ended:  # a callback may cancel the request, and then it is not called back again
            self.finish()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Ends the request from outside, with what it has."""
        self.completion.finish_reason, self.completion.error = reason, error
        self._add([])

    def finish(self) -> None:
        """Calls `on_finish`, unless that was done before."""
        on_finish, self.on_finish = self.on_finish, None
        if on_finish:
            on_finish(self.completion)

    def _add(self, tokens: list[int]) -> tuple[list[int], str]:
        """Adds to the completion what is certain of the tokens and of those that were held back, and returns it."""
        text = ""
        if self.text is not None:
            tokens, text = self.text.take(ended=self.done)
            self.completion.text = self.text.text[: self.text.shown_text]
        self.completion.tokens += tokens
        return tokens, text
