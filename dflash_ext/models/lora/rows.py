"""Runs a base's own modules on rows whose positions, inputs and masks are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from ...integrations import as_attention_mask
from ...integrations.attention import NAME, runs_block_attn
from ...integrations.fused_layers import replaced_forwards
from ...integrations.rotation import replaced_now, replaced_rotation
from ...masks import IntervalMask
from ..target import Target

States = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def read_context(
    target: Target, ids: Tensor, positions: Tensor, masks: Mapping[str, IntervalMask]
) -> tuple[Tensor, States]:
    """The hidden states [B, S, H] of tokens [B, S] after the final norm, and their keys and values in every layer.

    The latter are [B, Hkv, S, D] each, those of all tokens in layers with a window, too.
    """
    cache = DynamicCache()
    hidden = _run(target, positions, masks, input_ids=ids, use_cache=True, **{target.cache_argument: cache})
    return hidden, [(layer.keys, layer.values) for layer in cache.layers]


def run_rows(
    target: Target, inputs: Tensor, positions: Tensor, masks: Mapping[str, IntervalMask], context: States | None = None
) -> Tensor:
    """The hidden states [B, Q, H] of rows after the final norm.

    Args:
        inputs: [B, Q, H], as the first layer takes them.
        positions: int64 [B, Q].
        masks: by kind of layer, over the keys of the context and, behind them, of the rows.
        context: as from `read_context`.
    """
    given = {} if context is None else {"context_states": context}
    return _run(target, positions, masks, inputs_embeds=inputs, use_cache=False, **given)


def _run(target: Target, positions: Tensor, masks: Mapping[str, IntervalMask], **given) -> Tensor:
    packed = {kind: as_attention_mask(mask) for kind, mask in planned(target, masks).items()}
    mask = packed if len(packed) > 1 else next(iter(packed.values()))
    with operators(target):
        return target.decoder(attention_mask=mask, position_ids=positions, **given)[0]


@contextmanager
def operators(target: Target) -> Iterator[None]:
    """Within it, attention, rotations, norms and gated MLPs of the base run through this package's operators."""
    with runs_block_attn([target]), replaced_forwards(target.fused_forwards), replaced_rotation(target.rotations):
        yield


def planned(target: Target, masks: Mapping[str, IntervalMask]) -> dict[str, IntervalMask]:
    """The masks of each kind of layer with the tile lists of the attention kernels, made once for all its layers.

    Kinds of layers may differ in their heads (Gemma 4). Those whose modules do not tell are planned in each call.
    """
    made = {}
    for kind, mask in masks.items():
        layer = target.layers[target.layer_kinds.index(kind)]
        attention = next((part for part in layer.modules() if hasattr(part, "num_key_value_groups")), None)
        if attention is not None:
            heads = target.config.num_attention_heads // target.ranks
            mask = mask.plan(heads, heads // attention.num_key_value_groups, attention.head_dim)
        made[kind] = mask
    return made


@contextmanager
def recomputed(target: Target) -> Iterator[None]:
    """Within it, every layer of the base keeps only its inputs for the backward, which runs the layer again, with the
    forwards that its modules had in the first place (`replaced_forwards`) and the same attention and rotations."""

    def contexts(layer: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
        inside = {part: vars(part)["forward"] for part in layer.modules() if "forward" in vars(part)}
        del inside[layer]
        runs_ours = target.config._attn_implementation == NAME
        return nullcontext(), _again(target, inside, replaced_now(target.rotations), runs_ours)

    wrapped = {}
    for layer in target.layers:
        # Nothing random happens in a frozen layer, whose state a CUDA graph could not read.
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": partial(contexts, layer)}
        wrapped[layer] = partial(checkpoint, layer.forward, **options)
    with replaced_forwards(wrapped):
        yield


@contextmanager
def _again(
    target: Target, forwards: Mapping[nn.Module, Callable], rotations: Sequence[ModuleType], runs_ours: bool
) -> Iterator[None]:
    attention = runs_block_attn([target]) if runs_ours else nullcontext()
    with attention, replaced_forwards(forwards), replaced_rotation(rotations):
        yield
