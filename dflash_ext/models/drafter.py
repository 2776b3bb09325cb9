"""The DFlash drafter (arXiv 2602.06036): a few layers that denoise one block of tokens from a target's features.

Slot 0 of a block is the anchor, the last token that was committed. Slots 1..B-1 hold the mask token. The target's
features are fused once into the context, and each layer projects it with its own k_proj and v_proj. A layer's keys are
those of the context followed by those of the block. The context has no queries and does not pass through the MLPs. The
embedding and the head are the target's, unless the checkpoint has tables of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from ..masks import IntervalMask
from ..ops import block_attn, linear
from ..ops.trained_layer import gated_linear, rms_norm, rotate_heads
from ..reference.numerics import softcapped
from .drafter_config import DFlashConfig
from .target import Target

# The names of activations in transformers, and in our operators.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# The cache of transformers' own DFlash loop, which exists from 5.15 on.
_LOOP_CACHE = getattr(cache_utils, "DFlashCache", ())


class Slots(NamedTuple):
    """What a layer takes for a block's slots, and which of them it computes. By default every slot is a row of its own.

    Attributes:
        spread: makes the slots [B, Q, ...] of rows [B, R, ...]. Equal slots share a row, which is projected once.
        wanted: selects the slots of [B, Q, ...] that the result is needed for. The others serve as keys alone.
    """

    spread: Callable[[Tensor], Tensor] = lambda x: x
    wanted: Callable[[Tensor], Tensor] = lambda x: x


class DFlashRMSNorm(Qwen3RMSNorm):
    """The norm of a residual stream; with an update it first adds that, and returns the sum, too."""

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, update=update, eps=self.variance_epsilon)


class DFlashMLP(Qwen3MLP):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.hidden_act not in _ACTIVATIONS:
            return super().forward(x)
        activation = _ACTIVATIONS[self.config.hidden_act]
        return gated_linear(self.gate_proj(x), self.up_proj(x), self.down_proj.weight, activation)


class DFlashAttention(nn.Module):
    """Attention of the block over the keys [cached context | new context | block]."""

    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        block: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: IntervalMask,
        cache: Cache | None,
        slots: Slots,
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))

        # The products are concatenated instead of their inputs, of which autograd would keep one more copy.
        k, v = (
            torch.cat([project(context), slots.spread(project(block))], dim=1) for project in (self.k_proj, self.v_proj)
        )
        q = heads(slots.spread(self.q_proj(block)))
        cos, sin = rotary
        block_len = q.shape[1]
        q = self._rotated(q, self.q_norm, cos[:, -block_len:], sin[:, -block_len:])
        k = self._rotated(heads(k), self.k_norm, cos, sin)
        v = heads(v).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out = block_attn(q, k, v.to(q.dtype), _over_last_keys(mask, k.shape[2]))
        return self.o_proj(slots.wanted(out.transpose(1, 2).flatten(2)))

    def _rotated(self, heads: Tensor, norm: Qwen3RMSNorm, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads [B, L, heads, D] with their norm and rotary embedding, as [B, heads, L, D]."""
        return rotate_heads(heads, norm.weight, cos, sin, eps=norm.variance_epsilon).transpose(1, 2)


def _over_last_keys(mask: IntervalMask, count: int) -> IntervalMask:
    """The mask over its last `count` keys only: transformers' sliding-window caches keep no others."""
    gone = mask.kv_len - count
    if gone == 0:
        return mask
    bounds = (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi)
    return IntervalMask(*((bound - gone).clamp(min=0) for bound in bounds), count)


class DFlashLayer(GradientCheckpointingLayer):
    def __init__(self, config: DFlashConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer_idx)
        self.mlp = DFlashMLP(config)
        self.input_layernorm = DFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        block: Tensor,
        context: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: IntervalMask,
        cache: Cache | None,
        slots: Slots,
    ) -> Tensor:
        """`block` has the rows [B, R, H] that `slots` spreads. The result has the slots that it selects."""
        attended = self.self_attn(self.input_layernorm(block), context, rotary, mask, cache, slots)
        block, normed = self.post_attention_layernorm(slots.wanted(slots.spread(block)), attended)
        return block + self.mlp(normed)


# Under torch.compile, the results of these operators are kept for the backward, which computes all others again. The
# only sum is the one that a layer ends with.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.add.Tensor,
    torch.ops.dflash_ext.block_attn.default,
    torch.ops.dflash_ext.gated_linear.default,
}


def _keeping_products(function: Callable, *inputs, and_attended: bool = True):
    """function(*inputs). Under torch.compile, its backward keeps products alone, and computes the rest again.

    and_attended: whether it also keeps the product behind attention.
    """
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=partial(_contexts, and_attended))


def _contexts(and_attended: bool) -> tuple:
    is_next = False  # the product behind attention that is not kept

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:  # is called for one operator after the other
        nonlocal is_next
        if op is torch.ops.dflash_ext.block_attn.default:
            is_next = not and_attended
        elif op in _KEPT and is_next:
            is_next = False
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class FrozenTable(nn.Module):
    """An embedding or head that the checkpoint brings, [rows, H]. Like the target's tables, it is not trained."""

    def __init__(self, rows: int, hidden_size: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, hidden_size))


class DFlashDrafter(PreTrainedModel):
    """Reads and writes published DFlash checkpoints; serves training, decoding and transformers' own DFlash loop."""

    config_class = DFlashConfig
    base_model_prefix = ""
    main_input_name = "noise_embeds"
    _no_split_modules = ["DFlashLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        taps = len(config.target_layer_ids)
        self.fc = nn.Linear(taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = DFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DFlashRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        if config.own_embeddings:
            self.embed_tokens = FrozenTable(config.vocab_size, config.hidden_size)
        if config.own_head:
            self.lm_head = FrozenTable(config.draft_vocab_size or config.vocab_size, config.hidden_size)
        if config.draft_vocab_size:
            # The target's token of drafted token i is i + d2t[i]; t2d marks the target's tokens that can be drafted.
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.post_init()

    @classmethod
    def for_target(cls, target: Target, *, mask_token_id: int, **options) -> DFlashDrafter:
        """A new drafter of random weights for `target`; `options` are those of `DFlashConfig.for_target`."""
        return cls(DFlashConfig.for_target(target, mask_token_id=mask_token_id, **options))

    def start_from(self, other: DFlashDrafter) -> None:
        """Takes over the weights of another drafter; its blocks may have another size.

        Raises:
            ValueError: the drafters read other taps, their slots predict other positions, or their weights differ in
                shape.
        """
        for name in ("target_layer_ids", "sample_from_anchor", "num_hidden_layers"):
            mine, theirs = getattr(self.config, name), getattr(other.config, name)
            if mine != theirs:
                raise ValueError(f"the drafter to start from has {name} {theirs}, the new one {mine}")
        mine, theirs = ({name: list(x.shape) for name, x in each.state_dict().items()} for each in (self, other))
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"the drafter to start from has {name} {theirs.get(name)}, the new one {mine.get(name)}"
                )
        self.load_state_dict(other.state_dict())

    def get_input_embeddings(self) -> None:
        """None: no embedding is trained. Accelerate asks for it when it shards a model."""

    def check_target(self, target: Target) -> None:
        """Raises a ValueError that names the difference if this drafter was made for another target."""
        config = self.config
        for name, mine, theirs in (
            ("hidden_size", config.hidden_size, target.hidden_size),
            ("num_target_layers", config.num_target_layers, target.num_layers),
            ("vocab_size", config.vocab_size, target.vocab_size),
        ):
            if mine is not None and mine != theirs:
                raise ValueError(
                    f"the drafter was made for another target: its {name} is {mine}, "
                    f"{type(target.model).__name__} has {theirs}"
                )

    def embed(self, target: Target, token_ids: Tensor) -> Tensor:
        """Embeds block tokens [...] with the raw table, times the optional `input_embedding_scale`: [..., H].

        The table is the target's unless the drafter has its own; the result has the drafter's dtype.
        """
        table = self.embed_tokens.weight if self.config.own_embeddings else target.embedding
        scale = self.config.optional("input_embedding_scale")
        embeds = nn.functional.embedding(token_ids, table)
        return (embeds if scale is None else embeds * scale).to(self.dtype)

    def head(self, target: Target) -> Tensor:
        """The weight of the head, [V, H], or [draft_vocab_size, H] where only some of the target's tokens are drafted.

        It is the target's unless the drafter has its own.
        """
        if self.config.own_head:
            return self.lm_head.weight
        return target.head[self.drafted_tokens] if self.config.draft_vocab_size else target.head

    @property
    def drafted_tokens(self) -> Tensor:
        """The target's tokens that the rows of a reduced head stand for: int64 [draft_vocab_size]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def head_labels(self, tokens: Tensor) -> Tensor:
        """The rows of the head for the target's tokens [...]; -1 for a token that the drafter cannot draft."""
        if not self.config.draft_vocab_size:
            return tokens
        rows = torch.full((self.config.vocab_size,), -1, device=tokens.device)
        rows[self.drafted_tokens.to(tokens.device)] = torch.arange(len(self.d2t), device=tokens.device)
        return rows[tokens]

    def logits(self, target: Target, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """Applies the head to the drafter's output [..., H], without a gradient: [..., V] in the target's dtype.

        V is the target's vocabulary; a token that the drafter cannot draft has -inf. `head` replaces `head(target)`,
        which is a copy where only some of the target's tokens are drafted. On the CPU it may be in bfloat16 for a
        drafter in float32.
        """
        head = self.head(target) if head is None else head
        rows = self.head_input(hidden)
        is_narrow = rows.device.type == "cpu" and (rows.dtype, head.dtype) == (torch.float32, torch.bfloat16)
        logits = linear(rows if is_narrow else rows.to(head.dtype), head).to(target.dtype)
        logits = softcapped(logits, self.softcap)
        if not self.config.draft_vocab_size:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        full[..., self.drafted_tokens] = logits
        return full

    def head_input(self, hidden: Tensor) -> Tensor:
        """The input of the head: the drafter's output times the optional `output_multiplier`."""
        multiplier = self.config.optional("output_multiplier")
        return hidden if multiplier is None else hidden * multiplier

    @property
    def softcap(self) -> float | None:
        """The softcap of the drafter's logits, if there is one. A value of 0 or less means none."""
        softcap = self.config.optional("final_logit_softcapping")
        return softcap if softcap is not None and softcap > 0 else None

    def anchor_masks(
        self, context_len: int, anchors: Tensor, keep: Tensor | None = None, context_start: Tensor | None = None
    ) -> dict[str, IntervalMask]:
        """Training masks by kind of layer, for blocks at `anchors` [B, N] over a context of `context_len` keys.

        They are planned for the drafter's heads, once for all layers.
        """
        config = self.config
        return {
            kind: IntervalMask.anchor_blocks(
                context_len,
                anchors,
                config.block_size,
                keep=keep,
                context_start=context_start,
                window=window,
                causal=causal,
                convention=config.window_convention,
            ).plan(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            for kind, causal, window in config.attention_kinds()
        }

    def decode_masks(self, cache_lens: Tensor, block_len: int, kv_len: int) -> dict[str, IntervalMask]:
        """Decoding masks by kind of layer: a block after the first `cache_lens` [B] context keys of each row."""
        options = {"convention": self.config.window_convention, "kv_len": kv_len}
        return {
            kind: IntervalMask.decode(cache_lens, block_len, causal=causal, window=window, **options)
            for kind, causal, window in self.config.attention_kinds()
        }

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor,
        attention_mask: dict[str, IntervalMask] | Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        first_slot: int = 0,
        mask_embed: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Denoises blocks in one pass.

        Args:
            noise_embeds: [B, Q, H], the embedded slots: one block when decoding, all anchors' blocks when training.
            context_hidden_states: [B, S, taps * H], the target's features that are not in the cache yet.
            position_ids: int64 [B, S + Q]: the context's positions, then the slots'.
            attention_mask: masks by kind of layer (`anchor_masks`, `decode_masks`); or, for one block, None or a
                padding mask [B, cached + S + Q] that is True (1) for tokens and False (0) for padding on the left.
            cache: a cache of the context's keys and values. The block's are appended, and the caller drops them again.
            past_key_values: another name of `cache`, which transformers' own DFlash loop uses from 5.15 to 5.23.
            first_slot: the result leaves out the slots before this one in every block, and the last layer does not
                compute them. Above 0, there must be whole blocks.
            mask_embed: [H], the embedded mask token. `noise_embeds` then holds the anchors alone, [B, N, H], and all
                other slots of their blocks hold this one. The first layer projects it once for all of them. The masks
                must be given by kind of layer.

        Returns:
            `last_hidden_state` [B, Q, H], to which the head is applied (`logits`). Slot k predicts the token at
            anchor + k, so that slot 0's output is unused. With `sample_from_anchor` it predicts the token at
            anchor + k + 1.

        Raises:
            ValueError: `cache` and `past_key_values` are both given, or transformers' own loop calls a drafter that it
                would not run correctly.
        """
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("cache and past_key_values name the same argument: only one of them may be given")
            cache = past_key_values
        if isinstance(cache, _LOOP_CACHE) and (unread := self.config.unread_by_loop()):
            raise ValueError(f"transformers' own DFlash loop {unread}: decode with dflash_ext.decode")
        hidden, slots = noise_embeds, Slots()
        if mask_embed is not None:
            hidden = torch.cat([noise_embeds, mask_embed.expand(len(noise_embeds), 1, -1)], dim=1)
            slots = Slots(spread=self._blocks_of)
        if not isinstance(attention_mask, dict):
            cached = cache.get_seq_length() if cache is not None else 0
            kv_len = cached + context_hidden_states.shape[1] + noise_embeds.shape[1]
            attention_mask = self._single_block_masks(attention_mask, noise_embeds, kv_len)
        context = _keeping_products(self._fused, context_hidden_states)
        rotary = self.rotary_emb(noise_embeds.new_empty(0, dtype=torch.float32), position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            is_last = layer is self.layers[-1]
            if is_last and first_slot > 0:
                slots = slots._replace(wanted=partial(self._slots_from, first_slot))
            inputs = hidden, context, rotary, attention_mask[kind], cache, slots
            # A step takes the most memory in the backward of the last layer's MLP, so that layer keeps less before it.
            hidden = _keeping_products(layer, *inputs, and_attended=not is_last)
            slots = Slots()
        # The cache is passed by its position, because transformers 5.24 renamed its field.
        return BaseModelOutputWithPast(self.norm(hidden), cache)

    def _fused(self, context_hidden_states: Tensor) -> Tensor:
        """The context [B, S, H] of the target's features."""
        return self.hidden_norm(self.fc(context_hidden_states.to(self.fc.weight.dtype)))

    def _blocks_of(self, rows: Tensor) -> Tensor:
        """The slots [B, N * block_size, ...] of N anchors and the mask token, which are the rows [B, N + 1, ...]."""
        anchors, mask = rows[:, :-1, None], rows[:, -1:, None]
        masks = mask.expand(-1, anchors.shape[1], self.config.block_size - 1, *rows.shape[2:])
        return torch.cat([anchors, masks], dim=2).flatten(1, 2)

    def _slots_from(self, first: int, slots: Tensor) -> Tensor:
        """The slots from `first` on in every block of [B, N * block_size, ...]."""
        return slots.unflatten(1, (-1, self.config.block_size))[:, :, first:].flatten(1, 2)

    def _single_block_masks(self, padding: Tensor | None, noise_embeds: Tensor, kv_len: int) -> dict[str, IntervalMask]:
        batch, block_len = noise_embeds.shape[:2]
        lens = torch.full((batch,), kv_len - block_len, dtype=torch.int32, device=noise_embeds.device)
        masks = self.decode_masks(lens, block_len, kv_len)
        if padding is None:
            return masks
        first = padding.int().argmax(dim=1, keepdim=True).int()
        return {
            kind: IntervalMask(mask.ctx_lo.maximum(first), mask.ctx_hi, mask.blk_lo, mask.blk_hi, kv_len)
            for kind, mask in masks.items()
        }
