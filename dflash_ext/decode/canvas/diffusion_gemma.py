"""The forward of transformers' DiffusionGemma over a cache of slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
import transformers
from packaging import version
from torch import Tensor
from transformers import PreTrainedModel

from ...integrations import as_attention_mask
from ...integrations.attention import runs_block_attn
from ...integrations.fused_layers import fused_forwards, replaced_forwards
from ...models.target import cache_argument
from ..forward.masks import Masks, block_masks, causal_masks
from ..forward.modules import SlotCache

OLDEST = "5.17"  # before, the decoder reads the cache's tensors themselves, past the cache's own methods


class DiffusionGemmaForward:
    """`DiffusionGemmaForBlockDiffusion` as it is: its encoder reads tokens, and its decoder gives canvases logits.

    transformers' decoder copies the whole cache in each layer and step, to append the canvas. Here it writes the canvas
    behind the cached tokens, where the next step or the committed tokens overwrite it. So the prompt may have any
    length, beyond the sliding window too.

    Args:
        slots, tokens, rows: as in `LeanForward`.
        fused: whether norms and gated MLPs run as fused operators, which round differently from transformers' modules.

    Raises:
        ValueError: rows of so many tokens do not fit, the encoder sees later tokens, or this release of transformers is
            older than `OLDEST`.
    """

    mask_id, self_conditions, first_guess = None, True, None

    def __init__(self, model: PreTrainedModel, *, slots: int, tokens: int, rows: int, fused: bool = True):
        if version.parse(transformers.__version__) < version.parse(OLDEST):
            raise ValueError(
                f"canvases of DiffusionGemma need transformers {OLDEST} or newer; this is {transformers.__version__}"
            )
        self.config = model.config.get_text_config()
        if tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"rows of {tokens} tokens do not fit: the model has {self.config.max_position_embeddings} positions"
            )
        if self.config.use_bidirectional_attention == "all":
            raise ValueError("use_bidirectional_attention is 'all': canvases need a causal encoder")
        self.encoder, self.decoder = model.model.encoder.language_model, model.model.decoder
        self.head, self.softcap = model.lm_head.weight, model.final_logit_softcapping
        self.embedding = self.decoder.embed_tokens
        self.like = self.embedding.weight
        self.windows = {
            kind: self.config.sliding_window if kind == "sliding_attention" else None
            for kind in set(self.config.layer_types)
        }
        self.cache = SlotCache(slots, tokens, [self.windows[kind] for kind in self.config.layer_types], rows)
        self.attentions = [layer.self_attn for stack in (self.encoder, self.decoder) for layer in stack.layers]
        self.fused = fused_forwards(self.encoder) | fused_forwards(self.decoder) if fused else {}
        self.cache_argument = cache_argument(self.encoder)

    def encode(self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> None:
        given = self._given(causal_masks, positions, start, counts, slots)
        masks = given.pop("masks")
        with runs_block_attn(self.attentions), replaced_forwards(self.fused):
            self.encoder(input_ids=tokens, attention_mask=masks, position_ids=positions.clamp(min=0), **given)

    commit = encode

    def denoise(
        self, tokens: Tensor, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor, soft: Tensor
    ) -> Tensor:
        given = self._given(block_masks, positions, start, counts, slots)
        masks = given.pop("masks")
        decoder, positions = self.decoder, positions.clamp(min=0)
        with runs_block_attn(self.attentions), replaced_forwards(self.fused), self._writing():
            hidden = decoder.self_conditioning(self.embedding(tokens), soft)
            rotary = {kind: decoder.rotary_emb(hidden, positions, kind) for kind in self.windows}
            for layer, kind in zip(decoder.layers, self.config.layer_types, strict=True):
                hidden = layer(
                    hidden,
                    position_embeddings=rotary[kind],
                    attention_mask=masks[kind],
                    position_ids=positions,
                    **given,
                )
            return torch.nn.functional.linear(decoder.norm(hidden), self.head)

    def condition(self, expected: Tensor) -> Tensor:
        return expected * self.embedding.embed_scale.to(expected.dtype)

    def _given(self, masks: Masks, positions: Tensor, start: Tensor, counts: Tensor, slots: Tensor) -> dict:
        """What all layers get, beside the masks by kind of layer."""
        tables = self.cache.place(slots, positions, gathers=False)
        seen = masks(self.windows, start, positions.shape[1], counts, self.cache.capacity)
        packed = {kind: as_attention_mask(mask) for kind, mask in seen.items()}
        return {"masks": packed, self.cache_argument: self.cache, "block_table": tables}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Lets the decoder's layers write the canvas into the cache, as the encoder's do with their tokens."""

        def write(attention, cache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.update(keys, values, attention.layer_idx)

        attentions = [layer.self_attn for layer in self.decoder.layers]
        with ExitStack() as undo:
            for attention in attentions:
                attention.append_to_cache = MethodType(write, attention)
                undo.callback(delattr, attention, "append_to_cache")
            yield
