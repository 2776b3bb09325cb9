"""A DFlash drafter on the engine's cache: `inject` keeps new context, `denoise` fills a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import DFlashDrafter, Target
from ...ops.cycle import CycleRows
from ...ops.kv import inject_fitting, product
from ...ops.layer import add_rms_norm
from ..forward.families import drafter_stack
from ..forward.layers import Rows
from ..kv_cache import KVCache, block_table
from .backlog import AT_ONCE, MOST, Backlog
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
        # Copies of the layers' key and value projections, one below the other, and of what comes behind them.
        attentions = [layer.self_attn for layer in drafter.layers]
        projections = [p for attention in attentions for p in (attention.k_proj, attention.v_proj)]
        self.weight = torch.cat([p.weight.detach() for p in projections])
        bias = torch.cat([p.bias.detach() for p in projections]) if config.attention_bias else None
        k_norm = torch.stack([attention.k_norm.weight.detach() for attention in attentions])
        real = weight.dtype if weight.is_cuda else self.rotary[0].dtype
        self.behind = *self.rotary, None if bias is None else bias.to(real), k_norm.to(real)
        self.pages = [list(cache.transpose(2, 3)) for cache in (self.cache.keys, self.cache.values)]
        self.fuse, self.norm = drafter.fc.weight.detach(), drafter.hidden_norm.weight.detach()
        self.head = narrow(drafter.head(target), weight.dtype)
        if lazy:
            taps = len(target.tap_ids) * target.hidden_size
            self.backlog = Backlog(slots, MOST, taps, dtype=weight.dtype, device=weight.device)
            if weight.is_cuda:
                self._load_kernels(taps)

    def inject(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        """Adds the features to the context."""
        eps = self.drafter.config.rms_norm_eps
        fused = product(features.flatten(0, 1).to(self.weight.dtype).contiguous(), self.fuse)
        context = add_rms_norm(fused, self.norm, eps=eps).view(*positions.shape, -1)
        positions = positions.contiguous()
        where = positions, positions, *self.behind, block_table(slots)
        inject_fitting(context, self.weight, *self.pages, *where, eps)

    def commit(self, tokens: Tensor, features: Tensor | None, positions: Tensor, slots: Tensor) -> None:
        if self.backlog is not None and tokens.shape[1] == 1:
            self.backlog.keep(features, positions, slots)
        else:
            self.inject(tokens, features, positions, slots)

    def _load_kernels(self, taps: int) -> None:
        """Reads nothing, in all shapes in which features of late rows are read, so that their kernels are loaded."""
        weight = self.weight
        for count in (1 << i for i in range(AT_ONCE.bit_length())):
            places = torch.full((1, count), -1, device=weight.device)
            slots = torch.zeros(1, dtype=torch.int32, device=weight.device)
            self.inject(places, weight.new_zeros(1, count, taps), places, slots)

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
