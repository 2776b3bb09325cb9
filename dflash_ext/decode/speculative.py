"""Lossless speculative decoding with a block-diffusion drafter. Without a drafter, decoding is plain.

In a cycle, the drafter fills a block after the anchor in one pass, and the target verifies the whole block in one pass.
The longest accepted prefix and one token of the target's own (the bonus token) are committed, and the bonus token is
the next anchor. Greedy output is the target's own greedy output. At temperatures above 0, rejection sampling keeps the
target's distribution (Leviathan et al., arXiv 2211.17192). The rows of a batch accept different lengths, and each row
keeps its own positions in `RowCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..checks import shown
from ..models import DFlashDrafter, Target
from ..ops import sample, verify
from ..reference import Verification
from .arguments import OFF, integer, per_prompt, stop_ids, token_ids
from .cache import RowCache
from .completion import Completion, Decoded
from .stopwatch import Stopwatch


@torch.no_grad()
def decode(
    target: Target,
    drafter: DFlashDrafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] | Tensor = 0.0,
    top_k: int | Sequence[int | None] | Tensor | None = None,
    top_p: float | Sequence[float | None] | Tensor | None = None,
    min_p: float | Sequence[float | None] | Tensor | None = None,
    stop_token_ids: int | Iterable[int] | None = None,
    block_size: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_finish: Callable[[int, Completion], None] | None = None,
) -> Decoded:
    """Completes prompts with the target's own output, drafted by `drafter`.

    Args:
        target: the verifier; with a drafter, tapped at the drafter's `target_layer_ids`.
        drafter: None decodes plainly, one token per pass.
        prompts: token ids, at least one per prompt.
        max_new_tokens: the length at which an answer ends if nothing ended it before.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters of the target's and of the drafter's distribution, as in `dflash_ext.sample`. None
            is off. The temperature and each filter are one number for all prompts, or a sequence with one per prompt.
        stop_token_ids: one or several tokens that end a row. They are kept in its output.
        block_size: slots of a drafted block, anchor included. The drafter's own number is the default and the largest.
        batch_size: the number of rows that are decoded at a time. Prompts of similar length share a batch.
        seed: the seed of all draws. A prompt's draws do not depend on the other prompts of the batch.
        on_tokens: called with a prompt's index and its newly committed tokens, cycle by cycle.
        on_finish: called with a prompt's index and its completion as soon as it ends.

    Raises:
        ValueError: a prompt is empty, too long for the target or outside its vocabulary; a number is out of range; a
            sequence has not one number per prompt; the drafter cannot fill the block, or was made for another target.
        TypeError: a prompt or stop token is no token id, a number has another type, or `target` is no Target.
    """
    if not isinstance(target, Target):
        raise TypeError(f"decode: target is {shown(target)}; a Target is needed, such as Target(model)")
    prompts = [token_ids(index, prompt) for index, prompt in enumerate(prompts)]
    if not prompts:
        raise ValueError("there is no prompt to decode")
    if empty := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise ValueError(f"prompt {empty[0]} has no tokens: a prompt needs at least one")
    for index, prompt in enumerate(prompts):
        if outside := [token for token in prompt if not 0 <= token < target.vocab_size]:
            raise ValueError(f"prompt {index} has token {outside[0]}; the target's vocabulary has {target.vocab_size}")
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    batch_size, seed = integer("batch_size", batch_size), integer("seed", seed)
    block_size = None if block_size is None else integer("block_size", block_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least one token is decoded")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least one row is decoded at a time")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options = {name: per_prompt(name, given, len(prompts)) for name, given in options.items()}
    stops_at = stop_ids(stop_token_ids)
    longest = max(map(len, prompts))
    target.check_length(longest + max_new_tokens, f"a prompt of {longest} tokens and {max_new_tokens} new ones")
    draft_width = _draft_width(target, drafter, block_size)

    completions = [Completion() for _ in prompts]
    decoded = Decoded(completions, draft_width)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def commit(index: int, tokens: list[int], *, cycle: bool = True) -> bool:
        """Adds tokens to a row up to a stop token; returns whether the row has ended."""
        completion = completions[index]
        stops = [i for i, token in enumerate(tokens) if token in stops_at]
        tokens = tokens[: stops[0] + 1] if stops else tokens
        completion.tokens += tokens
        if cycle:
            completion.committed.append(len(tokens))
        if stops:
            completion.finish_reason = "stop"
        elif len(completion.tokens) == max_new_tokens:
            completion.finish_reason = "length"
        if on_tokens:
            on_tokens(index, tokens)
        if completion.finish_reason and on_finish:
            on_finish(index, completion)
        return completion.finish_reason is not None

    for first in range(0, len(prompts), batch_size):
        indices = by_length[first : first + batch_size]
        batch = _Batch(
            target,
            drafter,
            [prompts[i] for i in indices],
            draft_width=draft_width,
            max_new_tokens=max_new_tokens,
            options={name: [numbers[i] for i in indices] for name, numbers in options.items()},
            seeds=[_row_seed(seed, index) for index in indices],
        )
        anchors = batch.prefill()
        decoded.prefill_seconds += batch.watch.lap()["prefill"]
        ended = [commit(i, [token], cycle=False) for i, token in zip(indices, anchors, strict=True)]
        while not all(ended):
            # Rows that have ended stay in the batch, frozen, until dropping them is worth a copy of the caches.
            if 4 * sum(ended) >= len(ended):
                rows = [row for row, done in enumerate(ended) if not done]
                batch.select(rows)
                indices, ended = [indices[row] for row in rows], [False] * len(rows)
            for row, (verified, tokens) in enumerate(batch.cycle(ended)):
                if not ended[row]:
                    completions[indices[row]].verified.append(verified)
                    completions[indices[row]].accepted.append(len(tokens) - 1)
                    ended[row] = commit(indices[row], tokens)
            decoded.cycles += 1
        laps = batch.watch.lap()
        decoded.draft_seconds += laps.get("draft", 0.0)
        decoded.verify_seconds += laps.get("verify", 0.0)
    return decoded


def _row_seed(seed: int, index: int) -> int:
    """A seed of 62 bits for a prompt. Positions are added to it."""
    return (seed * 0x9E3779B97F4A7C15 + (index << 24)) % 2**62


def _draft_width(target: Target, drafter: DFlashDrafter | None, block_size: int | None) -> int:
    if drafter is None:
        if block_size is not None:
            raise ValueError(f"block size {block_size} needs a drafter: plain decoding drafts nothing")
        return 0
    drafter.check_target(target)
    if tuple(drafter.config.target_layer_ids) != target.tap_ids:
        raise ValueError(
            f"the drafter reads the target's layers {drafter.config.target_layer_ids}, "
            f"the target is tapped at {list(target.tap_ids)}"
        )
    first, largest = drafter.config.first_draft_slot, drafter.config.block_size
    block_size = largest if block_size is None else block_size
    if not first + 1 <= block_size <= largest:
        raise ValueError(
            f"block size {block_size} is not supported: this drafter fills blocks of {first + 1} to {largest} slots"
        )
    return block_size - first


class _Batch:
    """Rows that are decoded together: their caches, their anchors, and features that the drafter has not seen yet."""

    def __init__(self, target, drafter, prompts, *, draft_width, max_new_tokens, options, seeds):
        self.target, self.drafter, self.draft_width = target, drafter, draft_width
        self.greedy = max(options["temperature"]) == 0
        self.watch = Stopwatch(target.device)
        device = target.device
        # The temperature and every filter that some row uses, each [B].
        self.options = {
            name: torch.tensor(numbers, device=device)
            for name, numbers in options.items()
            if name == "temperature" or set(numbers) != {OFF[name]}
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
        self.anchor = self._draw(logits, self.start[:, None])[0][:, 0]
        anchors = self.anchor.tolist()
        self.watch.stop()
        return anchors

    def cycle(self, ended: list[bool]) -> list[tuple[int, list[int]]]:
        """Drafts, verifies and commits once.

        Returns for every row the number of drafted tokens that were verified, and its new tokens. Rows that have
        `ended` take part as padding, without a position, and what is returned for them has no meaning.
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
        result = self._verify(draft, drawn, logits, room)
        # One transfer carries what the host needs: how many were verified and accepted, and the tokens.
        counts = torch.stack([room, result.accepted, result.next_token], dim=1)
        tokens = torch.cat([counts, draft], dim=1).tolist()
        self.watch.stop()

        self.anchor = result.next_token
        self.start = self.start + result.accepted + 1
        self.new_features = taps
        self.new_positions = verified.masked_fill(self.slots > result.accepted[:, None], -1)
        self.lengths = [length + row[1] + 1 for length, row in zip(self.lengths, tokens, strict=True)]
        return [(room, [*drafted[:accepted], bonus]) for room, accepted, bonus, *drafted in tokens]

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
        drawn = self._draw(self.drafter.logits(self.target, hidden[:, first:]), positions[:, 1:])
        self.watch.stop()
        return drawn

    def _draw(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws the tokens [B, K] at `positions` from logits [B, K, V], and what `verify` must know of the draw."""
        if self.greedy:
            return logits.argmax(dim=-1), {}
        drawn = sample(
            logits.flatten(0, 1),
            (self.seeds[:, None] + positions).flatten(),
            **{name: numbers.repeat_interleave(logits.shape[1]) for name, numbers in self.options.items()},
        )
        pivot, normaliser = (x.view(positions.shape) for x in (drawn.pivot, drawn.normaliser))
        return drawn.token.view(positions.shape), {
            "draft_logits": logits,
            "draft_pivot": pivot,
            "draft_normaliser": normaliser,
        }

    def _verify(self, draft: Tensor, drawn: dict[str, Tensor], logits: Tensor, draft_lens: Tensor) -> Verification:
        if self.greedy:
            return verify(draft, logits, draft_lens=draft_lens)
        return verify(draft, logits, seed=self.seeds + self.start, draft_lens=draft_lens, **self.options, **drawn)

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
