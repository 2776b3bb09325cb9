"""The forward of a stack of transformer layers over a cache, with few kernels between its matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...masks import IntervalMask
from ...ops import block_attn_decode, linear
from ...ops.layer import WEIGHTS, WIDEST, add_rms_norm, rotate_to_cache, run_layers
from ...ops.linear import MOST_ROWS, aligned, product_form
from ..kv_cache import KVCache, Where

HALVES = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Rows:
    """Where the rows of a forward stand. A row's position, its place in the cache and what it sees are independent.

    positions: int64 [B, R], by which rows are rotated; -1 for padding.
    places: int64 [B, R], where in the cache keys and values are kept; -1: nowhere.
    slots: int32 [B], the slots of the cache.
    masks: by kind of layer, over the cache's whole capacity.
    """

    positions: Tensor
    places: Tensor
    slots: Tensor
    masks: dict[str, IntervalMask]

    def part(self, first: int, last: int | None) -> Rows:
        """The rows [first, last) of each entry."""
        names = "ctx_lo", "ctx_hi", "blk_lo", "blk_hi"
        masks = {
            kind: IntervalMask(*(getattr(mask, name)[:, first:last] for name in names), mask.kv_len)
            for kind, mask in self.masks.items()
        }
        return Rows(
            self.positions[:, first:last].contiguous(), self.places[:, first:last].contiguous(), self.slots, masks
        )


class Placed(NamedTuple):
    """What the layers of one forward share: B and R, the planned masks, and where the rows lie, by kind of layer."""

    shape: tuple[int, int]
    masks: dict[str, IntervalMask]
    where: dict[str, Where]
    cache: KVCache


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer. Norms and biases that a model does not have are None.

    qkv: [(Hq + 2 * Hkv) * D, H]; gate_up: [2 * I, H].
    attention_norm, mlp_norm: before the sublayer. after_attention, after_mlp: after it, before it is added.
    """

    kind: str
    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    after_attention: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    after_mlp: Tensor | None


@dataclass(frozen=True)
class Stack:
    """Layers of one model, and what they share.

    rotary: cos and sin [P, D / 2] by kind of layer, float32 (float64 for float64).
    scale, softcap: of the attention's scores. plus_one: norms multiply by 1 + weight.
    exact: the bits of a row depend on that row alone.
    """

    layers: Sequence[LayerWeights]
    final_norm: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    rotary: dict[str, tuple[Tensor, Tensor]]
    scale: float
    softcap: float | None
    eps: float
    plus_one: bool
    activation: str
    exact: bool = False

    def __post_init__(self):
        # Here, because a tensor that is made while a graph is captured holds nothing until the graph is replayed.
        object.__setattr__(self, "_flat", self._flattened())

    def planned(self, masks: dict[str, IntervalMask]) -> dict[str, IntervalMask]:
        """The masks with the tile lists of the attention kernel, made once for all layers."""
        shapes = self.heads, self.kv_heads, self.head_dim
        return {kind: mask.plan(*shapes, decode=True) for kind, mask in masks.items()}

    def forward(
        self, hidden: Tensor, rows: Rows, cache: KVCache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Runs rows through all layers and adds their keys and values to the cache.

        Args:
            hidden: [B * R, H], the embedded tokens, contiguous. It is overwritten.
            taps: the layers whose outputs are wanted. The last layer's is the output of the final norm.

        Returns:
            The output of the last layer before the final norm [B * R, H], and the tapped outputs side by side,
            [B * R, taps * H] (None without taps).
        """
        if not self._runs_at_once(hidden):
            tapped = {}
            for index, output in enumerate(self.layer_by_layer(hidden, rows, cache, taps)):
                hidden = output
                if index in taps:
                    tapped[index] = self.normed(hidden) if index == len(self.layers) - 1 else hidden
            return hidden, torch.cat([tapped[tap] for tap in taps], dim=1) if taps else None
        where = self._where(rows, cache)
        masks = rows.masks if hidden.device.type == "cpu" else self.planned(rows.masks)
        hidden, features = run_layers(
            hidden,
            *self._flat,
            *zip(*cache.layers, strict=True),
            *zip(*(where[kind] for kind in self.rotary), strict=True),
            [table for tables in self.rotary.values() for table in tables],
            [masks[kind] for kind in self.rotary],
            forms=self._forms(len(hidden)) if hidden.is_cuda else (),
            taps=taps,
            eps=self.eps,
            plus_one=self.plus_one,
            activation=self.activation,
            scale=self.scale,
            softcap=self.softcap,
            exact=self.exact,
        )
        for at, tap in enumerate(taps):
            if tap == len(self.layers) - 1:
                features[:, at] = self.normed(hidden)
        return hidden, features.flatten(1) if taps else None

    def layer_by_layer(self, hidden: Tensor, rows: Rows, cache: KVCache, taps: Sequence[int] = ()) -> Iterator[Tensor]:
        """The output of each layer [B * R, H], by kernels of their own. Those of `taps` are not overwritten."""
        placed = self._placed(rows, cache)
        for index, layer in enumerate(self.layers):
            projected = self._linear(hidden, layer.qkv, layer.qkv_bias, norm=layer.attention_norm)
            attended = self._attended(index, projected, placed)
            out = layer.out, layer.out_bias, layer.after_attention
            hidden = self._add(hidden, attended, *out, is_kept=index - 1 in taps)
            inner = self._linear(hidden, layer.gate_up, layer.gate_up_bias, norm=layer.mlp_norm, gate=self.activation)
            hidden = self._add(hidden, inner, layer.down, layer.down_bias, layer.after_mlp)
            yield hidden

    def _placed(self, rows: Rows, cache: KVCache) -> Placed:
        return Placed(rows.positions.shape, self.planned(rows.masks), self._where(rows, cache), cache)

    def _attended(self, index: int, projected: Tensor, placed: Placed) -> Tensor:
        """The attention of a layer: the projections [B * R, (Hq + 2 * Hkv) * D] to [B * R, Hq * D]."""
        layer, keys_values = self.layers[index], placed.cache.layers[index]
        to = placed.where[layer.kind]
        queries = rotate_to_cache(
            projected,
            *keys_values,
            to.positions,
            to.places,
            to.pages,
            *self.rotary[layer.kind],
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self.eps,
            plus_one=self.plus_one,
        )
        # A token that is an entry of its own becomes a row of the batch's entry again.
        queries = queries.transpose(1, 2).reshape(*placed.shape, self.heads, self.head_dim)
        attended = block_attn_decode(
            queries.transpose(1, 2),
            *(pages.transpose(1, 2) for pages in keys_values),
            placed.masks[layer.kind],
            block_table=to.table,
            scale=self.scale,
            softcap=self.softcap,
            exact=self.exact,
            constant_context=True,  # a forward's own keys are the last ones
        )
        return attended.transpose(1, 2).reshape(len(projected), -1)

    def _where(self, rows: Rows, cache: KVCache) -> dict[str, Where]:
        """Where the rows lie in the layers of each kind."""
        layers = {layer.kind: index for index, layer in enumerate(self.layers)}
        return {kind: cache.where(layers[kind], rows.positions, rows.places, rows.slots) for kind in self.rotary}

    def _runs_at_once(self, hidden: Tensor) -> bool:
        """Whether one operator runs all layers. On a GPU its kernels take half precision and rows of 16 bytes."""
        if hidden.device.type == "cpu":
            return True
        inner = self.layers[0].down.shape[1]
        return hidden.dtype in HALVES and hidden.shape[1] <= WIDEST and hidden.shape[1] % 8 == inner % 8 == 0

    def _flattened(self) -> tuple[list[Tensor], list[int]]:
        """The weights and the kinds of the layers in the form of `run_layers`, in which kernels read vectors, too."""
        none, kinds = self.final_norm.new_empty(0), list(self.rotary)
        weights = (getattr(layer, name) for layer in self.layers for name in WEIGHTS)
        given = [none if each is None else aligned(each) if each.dim() == 1 else each for each in weights]
        return given, [kinds.index(layer.kind) for layer in self.layers]

    def _forms(self, rows: int) -> list[int]:
        """How a GPU computes the products of each layer with so many rows."""
        rows = min(rows, MOST_ROWS + 1)
        if rows not in self._known_forms:
            self._known_forms[rows] = [form for layer in self.layers for form in self._forms_of(layer, rows)]
        return self._known_forms[rows]

    @cached_property
    def _known_forms(self) -> dict[int, list[int]]:
        return {}

    def _forms_of(self, layer: LayerWeights, rows: int) -> list[int]:
        around = [
            (layer.qkv, True, False, False),
            (layer.out, False, False, layer.after_attention is None),
            (layer.gate_up, True, True, False),
            (layer.down, False, False, layer.after_mlp is None),
        ]
        return [
            product_form(rows, weight, norm=norm, gate=gate, residual=residual, exact=self.exact)
            for weight, norm, gate, residual in around
        ]

    def normed(self, hidden: Tensor) -> Tensor:
        """The output of the final norm, [T, H]."""
        return add_rms_norm(hidden, self.final_norm, eps=self.eps, plus_one=self.plus_one)

    def head(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The final norm and a head [V, H]: [..., H] to [..., V]."""
        return self._linear(hidden, weight, norm=self.final_norm)

    def _add(
        self,
        hidden: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
        is_kept: bool = False,
    ) -> Tensor:
        """The residual stream after a sublayer, whose output may pass a norm of its own.

        The result may overwrite `hidden`, unless is_kept says that `hidden` is still needed.
        """
        if norm is None:
            return self._linear(rows, weight, bias, residual=hidden, overwrites_residual=not is_kept)
        update = self._linear(rows, weight, bias)
        if is_kept:
            hidden = hidden.clone()
        add_rms_norm(hidden, norm, update=update, update_norm=norm, eps=self.eps, plus_one=self.plus_one)
        return hidden

    def _linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None, **around: Tensor | str) -> Tensor:
        options = {"norm_eps": self.eps, "norm_plus_one": self.plus_one, "exact": self.exact}
        return linear(rows, weight, bias, constant_weight=True, **options, **around)


def rotary_tables(rotary: torch.nn.Module, like: Tensor, length: int, **kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [length, angles] of a model's rotary module, in the precision in which rows are rotated."""
    real = torch.promote_types(like.dtype, torch.float32)
    positions = torch.arange(length, device=like.device)[None]
    tables = rotary(torch.empty(0, dtype=real, device=like.device), positions, **kind)
    return tuple(table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)
