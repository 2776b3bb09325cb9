"""The results of decoding: the tokens of each prompt, and what each cycle committed and accepted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Answer:
    """The answer to one prompt, whatever decoded it.

    Attributes:
        tokens: the new tokens, including the stop token if one ended the row. A stop string is left out, and so is a
            token that holds any part of it.
        text: the text of the answer, up to a stop string. It is None without a tokenizer.
        finish_reason: "stop", "length", "cancelled" or "error".
        error: what ended the request if it failed.
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    error: BaseException | None = None


@dataclass
class Completion(Answer):
    """The answer to one prompt, token by token or by drafts.

    Attributes:
        committed: the number of tokens that each cycle added to the row, bonus token included. The first token of the
            row comes from prefill and is not counted here.
        verified: the number of drafted tokens that each cycle verified. It is less than the drafted number where the
            row's end is near.
        accepted: the number of verified tokens that each cycle accepted.
        drafted: the verified tokens of each cycle.
    """

    committed: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """The mean number of tokens committed per cycle; 1 for a row that ended in prefill."""
        return sum(self.committed) / len(self.committed) if self.committed else 1.0


@dataclass
class Decoded:
    """The completions of a call, in the order of its prompts, and the seconds that each phase took.

    Attributes:
        draft_width: the number of drafted tokens per cycle, 0 for plain decoding.
        cycles: the number of the target's forward passes after prefill, each for a whole batch.
        draft_seconds, verify_seconds, commit_seconds: the parts of these cycles. To commit is to keep the accepted
            tokens and, for the drafter, their features.
        costs: with the block size "auto", the seconds of a cycle by its number of rows and of drafted tokens, as
            `Engine` takes them.
    """

    completions: list[Completion]
    draft_width: int
    cycles: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    costs: dict[int, dict[int, float]] = field(default_factory=dict)

    @property
    def tau(self) -> float:
        """Tokens committed per cycle, bonus included: the mean of the requests' means (as in arXiv 2602.06036)."""
        return sum(c.tau for c in self.completions) / len(self.completions)

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed per cycle of a row, bonus included, over the cycles of all requests.

        Long answers count more than in tau.
        """
        committed = [count for c in self.completions for count in c.committed]
        return sum(committed) / len(committed) if committed else 1.0

    @property
    def acceptance(self) -> list[float]:
        """For each drafted position, the share of accepted tokens among the cycles that verified this position, 0 if
        none did.

        A token is accepted only if all tokens before it in the block are accepted.
        """
        verified = [v for c in self.completions for v in c.verified]
        accepted = [a for c in self.completions for a in c.accepted]
        positions = range(self.draft_width)
        return [sum(a > i for a in accepted) / max(sum(v > i for v in verified), 1) for i in positions]

    @property
    def decode_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds + self.commit_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding, without prefill and its token."""
        tokens = sum(sum(c.committed) for c in self.completions)
        return tokens / self.decode_seconds if self.decode_seconds else 0.0
