"""What the engine knows of each row, as tensors on the device: a cycle reads and writes them, and no host value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.cycle import FIELDS

FILTERS = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
OPTIONS = (*FILTERS, *PENALTIES)
OFF = dict(zip(OPTIONS, (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0), strict=True))


class State:
    """The rows of all slots.

    numbers: int64 [slots + 1, 5], the columns being `ops.cycle.FIELDS`: the position of the anchor, which is also the
        number of tokens in the caches; the anchor, which is the last committed token and in no cache yet; the last
        position that the target reads, after which the row ends; whether the row is decoded; its seed.
    options: float32 [slots + 1, 7], the columns being OPTIONS.
    stops: int64 [slots + 1, n], the tokens that end a row, -1 for none.
    counts: int32 [slots + 1, V], how often a row has each token, as `count_tokens_` keeps it; None until a row with a
        penalty comes. It is kept for such rows only.
    bias: float32 [slots + 1, V], what is added to a row's logits; None until a row with a bias comes.

    One more slot belongs to no row: it fills up what a graph decodes beyond the rows.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.spare = slots
        self.vocab_size, self.device = vocab_size, device
        self.numbers = torch.zeros(slots + 1, len(FIELDS), dtype=torch.int64, device=device)
        self.options = torch.zeros(slots + 1, len(OPTIONS), dtype=torch.float32, device=device)
        self.stops = torch.full((slots + 1, 1), -1, device=device)
        self.counts: Tensor | None = None
        self.bias: Tensor | None = None

    def options_of(self, slots: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of the OPTIONS of the rows in these slots (int64 [B]), float32 [B] each."""
        if not names:
            return {}
        values = self.options.index_select(0, slots)
        return {name: values[:, OPTIONS.index(name)] for name in names}

    def changes_of(self, slots: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The arguments of `sample` and `verify` for some of the PENALTIES, and for "logit_bias", of these rows."""
        if not names:
            return {}
        changes = self.options_of(slots, [name for name in names if name in PENALTIES])
        if changes:
            changes["token_counts"] = self.counts
        if "logit_bias" in names:
            changes["logit_bias"] = self.bias
        return changes | {"table_rows": slots}

    def admit(
        self,
        slots: Tensor,
        *,
        start: Sequence[int],
        last: Sequence[int],
        seed: Sequence[int],
        options: Sequence[dict[str, float]],
        stops: Sequence[Sequence[int]],
        bias: Sequence[dict[int, float]],
    ) -> None:
        """Puts new rows into these slots, inactive and without an anchor. The first row that needs a table makes it."""
        numbers = torch.tensor([start, [0] * len(start), last, [0] * len(start), seed]).T
        self.numbers[slots] = numbers.to(self.device, non_blocking=True)
        values = torch.tensor([[row[name] for name in OPTIONS] for row in options], dtype=torch.float32)
        self.options[slots] = values.to(self.device, non_blocking=True)
        width = self.stops.shape[1]
        padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in stops])
        self.stops[slots] = padded.to(self.device, non_blocking=True)
        table = len(self.numbers), self.vocab_size
        if self.counts is None and any(row[name] != OFF[name] for row in options for name in PENALTIES):
            self.counts = torch.zeros(table, dtype=torch.int32, device=self.device)
        if self.bias is None and any(bias):
            self.bias = torch.zeros(table, dtype=torch.float32, device=self.device)
        if self.bias is not None:
            self.bias[slots] = 0
            for slot, row in zip(slots.unbind(), bias, strict=True):
                if row:
                    tokens = torch.tensor(list(row), device=self.device)
                    self.bias[slot, tokens] = torch.tensor(list(row.values()), dtype=torch.float32, device=self.device)

    def widen_stops(self, count: int) -> bool:
        """Makes room for rows with `count` stop tokens. Returns whether the tensor has been replaced."""
        missing = count - self.stops.shape[1]
        if missing > 0:
            self.stops = torch.nn.functional.pad(self.stops, (0, missing), value=-1)
        return missing > 0

    def set_anchors(self, slots: Tensor, anchors: Tensor, active: Tensor) -> None:
        """Gives admitted rows their first tokens, and says which of them go on."""
        self.numbers[slots, FIELDS.index("anchor")] = anchors
        self.numbers[slots, FIELDS.index("active")] = active.long()

    def freeze(self, slot: int) -> None:
        """Ends a row from outside of a cycle."""
        self.numbers[slot, FIELDS.index("active")] = 0
