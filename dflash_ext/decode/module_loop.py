"""Decoding with the target's own modules, for families that the engine has no forward for.

The loop is Python around transformers' modules: it reads every cycle's tokens before the next cycle begins, and its
masks are dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models import DFlashDrafter, Target
from ..ops import verify
from .completion import Decoded
from .drawing import Drawing, draw
from .request import Request
from .row_cache import RowCache
from .stopwatch import Stopwatch


def decode_with_modules(
    target: Target,
    drafter: DFlashDrafter | None,
    requests: Sequence[Request],
    decoded: Decoded,
    *,
    batch_size: int,
) -> None:
    """Decodes requests in batches of `batch_size`, in their order, and adds the times to `decoded`."""
    for first in range(0, len(requests), batch_size):
        rows = list(requests[first : first + batch_size])
        batch = _Batch(
            target,
            drafter,
            [request.prompt for request in rows],
            draft_width=decoded.draft_width,
            max_new_tokens=rows[0].max_new_tokens,
            requests=rows,
            seeds=[request.seed for request in rows],
        )
        anchors = batch.prefill()
        decoded.prefill_seconds += batch.watch.lap()["prefill"]
        for request, token in zip(rows, anchors, strict=True):
            request.commit([token])
        while not all(request.done for request in rows):
            # Rows that have ended stay in the batch, frozen, until dropping them is worth a copy of the caches.
            ended = [request.done for request in rows]
            if 4 * sum(ended) >= len(ended):
                batch.select([row for row, done in enumerate(ended) if not done])
                rows = [request for request in rows if not request.done]
                ended = [False] * len(rows)
            for request, committed in zip(rows, batch.cycle(ended), strict=True):
                if not request.done:
                    request.commit_cycle(*committed)
            decoded.cycles += 1
        laps = batch.watch.lap()
        decoded.draft_seconds += laps.get("draft", 0.0)
        decoded.verify_seconds += laps.get("verify", 0.0)


class _Batch:
    """Rows that are decoded together: their caches, their anchors, and features that the drafter has not seen yet."""

    def __init__(self, target, drafter, prompts, *, draft_width, max_new_tokens, requests, seeds):
        self.target, self.drafter, self.draft_width = target, drafter, draft_width
        self.watch = Stopwatch(target.device)
        device = target.device
        # Of the temperature and the filters those that some row uses, each [B]; none of them is greedy decoding.
        filters = Drawing.of(requests).filters
        self.options = {
            name: torch.tensor([request.options[name] for request in requests], device=device) for name in filters
        }
        # A seed belongs to a prompt and a position, so that a row's draws do not depend on the other rows.
        self.seeds = torch.tensor(seeds, device=device)
        # Prompts are aligned at their ends, so that the last column is every row's last token.
        self.lengths = [len(prompt) for prompt in prompts]
        width = max(self.lengths)
        self.prompt_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.start = torch.tensor(self.lengths, device=device)  # position of the anchor
        positions = torch.arange(width, device=device) - (width - self.start)[:, None]
        self.new_positions = positions.clamp(min=-1)
        self.slots = torch.arange(draft_width + 1, device=device)
        # The target reads every token of a row except the last one. The drafter's block may reach beyond that.
        self.last = self.start + max_new_tokens - 2
        capacity = width + max_new_tokens - 1
        self.target_cache, self.draft_cache = RowCache(capacity), RowCache(capacity + draft_width)

    def prefill(self) -> list[int]:
        """Runs the prompts through the target and draws every row's first token, its first anchor."""
        self.watch.start("prefill")
        chunk, features = 1024, []
        for ids, positions in zip(self.prompt_ids.split(chunk, 1), self.new_positions.split(chunk, 1), strict=True):
            # One more than the highest position of these columns: the longest row has no padding.
            end = self.target_cache.visible + ids.shape[1]
            self.target_cache.place(positions, end)
            logits, taps = self.target.step(ids, positions, self.target_cache, keep_logits=1)
            features.append(taps)
        self.new_features = torch.cat(features, dim=1) if self.drafter else None
        self.anchor = draw(logits, self.seeds, self.start, self.options, {})[0][:, 0]
        anchors = self.anchor.tolist()
        self.watch.stop()
        return anchors

    def cycle(self, ended: list[bool]) -> list[tuple[list[int], int, int]]:
        """Drafts, verifies and commits once.

        Returns for every row the drafted tokens that were verified, how many of them were accepted, and the bonus
        token. Rows that have `ended` take part as padding, without a position, and what is returned for them has no
        meaning.
        """
        frozen = torch.tensor(ended, device=self.start.device)
        self.start = self.start.masked_fill(frozen, 0)
        positions = (self.start[:, None] + self.slots).masked_fill(frozen[:, None], -1)
        end = 1 + self.draft_width + max(n for n, done in zip(self.lengths, ended, strict=True) if not done)
        draft, drawn = self._draft(positions, end)
        self.watch.start("verify")
        block = torch.cat([self.anchor[:, None], draft], dim=1)
        # Drafted tokens for which the row has no room are padding for the target, and are not verified.
        room = (self.last - self.start).clamp(0, self.draft_width)
        verified = positions.masked_fill(self.slots > room[:, None], -1)
        self.target_cache.place(verified, min(end, self.target_cache.capacity))
        logits, taps = self.target.step(block, verified, self.target_cache, keep_logits=self.draft_width + 1)
        chance = self.options and {"seed": self.seeds + self.start} | self.options
        result = verify(draft, logits, draft_lens=room, **chance, **drawn)
        # One transfer carries what the host needs: how many were verified and accepted, and the tokens.
        counts = torch.stack([room, result.accepted, result.next_token], dim=1)
        tokens = torch.cat([counts, draft], dim=1).tolist()
        self.watch.stop()

        self.anchor = result.next_token
        self.start = self.start + result.accepted + 1
        self.new_features = taps
        self.new_positions = verified.masked_fill(self.slots > result.accepted[:, None], -1)
        self.lengths = [length + row[1] + 1 for length, row in zip(self.lengths, tokens, strict=True)]
        return [(drafted[:room], accepted, bonus) for room, accepted, bonus, *drafted in tokens]

    def _draft(self, positions: Tensor, end: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The drafted tokens [B, K], and what `verify` must know of their draw."""
        if self.drafter is None:
            return positions[:, :0], {}
        self.watch.start("draft")
        first = self.drafter.config.first_draft_slot
        slots = positions[:, : self.draft_width + first]
        block = torch.full_like(slots, self.drafter.config.mask_token_id)
        block[:, 0] = self.anchor
        placed = torch.cat([self.new_positions, slots], dim=1)
        self.draft_cache.place(placed, end)
        hidden = self.drafter(
            noise_embeds=self.drafter.embed(self.target, block),
            context_hidden_states=self.new_features,
            position_ids=placed.clamp(min=0),
            attention_mask=self.drafter.decode_masks(self.start.int(), slots.shape[1], end),
            cache=self.draft_cache,
        ).last_hidden_state
        logits = self.drafter.logits(self.target, hidden[:, first:])
        drawn = draw(logits, self.seeds, self.start + 1, self.options, {})
        self.watch.stop()
        return drawn

    def select(self, rows: list[int]) -> None:
        """Keeps only these rows."""
        index = torch.tensor(rows, device=self.start.device)
        self.lengths = [self.lengths[row] for row in rows]
        self.anchor, self.start, self.last = self.anchor[index], self.start[index], self.last[index]
        self.options = {name: numbers[index] for name, numbers in self.options.items()}
        self.seeds = self.seeds[index]
        self.new_positions = self.new_positions[index]
        self.target_cache.select(index)
        if self.drafter is not None:
            self.new_features = self.new_features[index]
            self.draft_cache.select(index)
