"""A DFlash drafter on the engine's cache: `inject` keeps new context, `denoise` fills a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import DFlashDrafter, Target
from ...ops import kv_inject, linear
from ...ops.cycle import CycleRows
from ...ops.layer import add_rms_norm
from ..forward.families import drafter_stack
from ..forward.layers import Rows
from ..kv_cache import KVCache, block_table
from .backlog import Backlog
from .base import Draft, narrow
from .uniform import next_block, noise


class BlockDraft(Draft):
    """Drafts from the target's features, which become keys and values of the drafter's layers.

    Args:
        width, steps, greedy: as in `Draft`.
        slots, tokens: the number of rows, and the largest number of tokens in a row, as in `KVCache`.
        lazy: whether features of plain cycles wait for the next draft.
    """

    def __init__(
        self,
        drafter: DFlashDrafter,
        target: Target,
        *,
        width: int,
        slots: int,
        tokens: int,
        steps: int = 1,
        greedy: bool = False,
        lazy: bool = False,
    ):
        super().__init__(target, width=width, steps=steps, greedy=greedy, taps=target.tap_ids)
        self.drafter = drafter
        config = drafter.config
        layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        weight = drafter.fc.weight
        self.cache = KVCache(layers, slots, heads, head_dim, tokens, dtype=weight.dtype, device=weight.device)
        self.stack = drafter_stack(drafter, self.cache.capacity)
        self.rotary = next(iter(self.stack.rotary.values()))
        # A copy of the layers' key and value projections, one below the other.
        projections = [p for layer in drafter.layers for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        self.weight = torch.cat([p.weight.detach() for p in projections])
        self.bias = torch.cat([p.bias.detach() for p in projections]) if config.attention_bias else None
        self.head = narrow(drafter.head(target), weight.dtype)
        if lazy:
            taps = len(target.tap_ids) * target.hidden_size
            self.backlog = Backlog(slots, taps, dtype=weight.dtype, device=weight.device)
        self.k_norm = torch.stack([layer.self_attn.k_norm.weight.detach() for layer in drafter.layers])

    def inject(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Adds the features to the context."""
        fused = linear(features.flatten(0, 1).to(self.weight.dtype), self.drafter.fc.weight.detach())
        eps = self.drafter.config.rms_norm_eps
        context = add_rms_norm(fused, self.drafter.hidden_norm.weight.detach(), eps=eps)
        kv_inject(
            context.view(*positions.shape, -1),
            self.weight,
            *(cache.transpose(2, 3) for cache in (self.cache.keys, self.cache.values)),
            positions,
            *self.rotary,
            bias=self.bias,
            k_norm=self.k_norm,
            norm_eps=eps,
            block_table=block_table(slots),
        )

    def denoise(self, rows: CycleRows, known: Tensor, count: int) -> tuple[Tensor, None]:
        drafter = self.drafter
        first = known.shape[1] - 1 + drafter.config.first_draft_slot
        block = torch.full_like(rows.block_positions, drafter.config.mask_token_id)
        block[:, : known.shape[1]] = known
        return self.read(rows, block, first, count), None

    def read(self, rows: CycleRows, block: Tensor, first: int, count: int) -> Tensor:
        """The logits [B, count, V] of slots from `first` on, given the tokens in all slots of blocks, int64 [B, n]."""
        drafter = self.drafter
        masks = drafter.decode_masks(rows.start, block.shape[1], self.cache.capacity)
        hidden = drafter.embed(self.target, block).flatten(0, 1)
        where = Rows(rows.block_positions, rows.block_places, rows.slots, masks)
        output, _ = self.stack.forward(hidden, where, self.cache)
        wanted = self.stack.normed(output).view(*block.shape, -1)[:, first : first + count]
        return drafter.logits(self.target, wanted, self.head)

    def block_len(self, width: int) -> int:
        return width + self.drafter.config.first_draft_slot if width else 0

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)


class UniformDraft(BlockDraft):
    """Drafts with a drafter of uniform noise: a block starts from random tokens, and each step draws all of it anew.

    A step reads what the one before was sure of (`next_block`). With several steps a token depends on those behind it,
    too. So such a draft is a point mass, and the likeliest one.
    """

    def draft(
        self, rows: CycleRows, width: int, filters: dict[str, Tensor], changes: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = noise(rows, width, self.target.vocab_size)
        for step in range(1, self.steps + 1):
            logits = self.read(rows, torch.cat([rows.anchor[:, None], tokens], dim=1), 1, width)
            if step < self.steps:
                tokens = next_block(rows, logits, step)
        known = filters if self.steps == 1 else {}
        return self.draw(logits, None, rows.anchor, rows.seed, rows.start + 1, known, changes)
