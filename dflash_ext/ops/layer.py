"""What stands between the matrix products of a transformer layer when a model decodes; no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks import IntervalMask
from ..native import load
from .backends import warn_of_portable_kernels

load()
_add_rms_norm = torch.ops.dflash_ext.add_rms_norm.default
_rotate_to_cache = torch.ops.dflash_ext.rotate_to_cache.default
_gated = torch.ops.dflash_ext.gated.default
_add_halves = torch.ops.dflash_ext.add_halves_.default
_run_layers = torch.ops.dflash_ext.run_layers.default

WIDEST = 24576  # the most columns of rows that have a norm on a GPU
ACTIVATIONS = ("silu", "gelu_tanh")  # the operator knows them by their places
# What add_halves takes: ranks, and that of which each projection has a multiple of columns.
HALVES_RANKS, HALVES_COLUMNS = (16, 32, 64, 128), 32
# The order of a layer's weights in run_layers.
WEIGHTS = (
    *("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias", "after_attention"),
    *("mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "after_mlp"),
)


def add_rms_norm(
    residual: Tensor,
    norm: Tensor,
    *,
    update: Tensor | None = None,
    update_norm: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
) -> Tensor:
    """Adds to the residual stream in place, and returns its RMS norm.

    Args:
        residual: ``[T, H]``, contiguous; float32, bfloat16 or float16, on the CPU also float64.
        norm: ``[H]``, the weight of the norm.
        update: ``[T, H]``, what a sublayer puts out; its rows may lie apart. None: nothing is added.
        update_norm: ``[H]``, the weight of a norm that the update passes first (Gemma 2 and 3).
        eps: added to the mean square.
        plus_one: both norms multiply by 1 + weight (Gemma).

    All tensors have one dtype; sums are in float32 (float64 for float64). The residual is rounded to its dtype before
    it is normalised, as in the model's own modules.

    Returns:
        ``[T, H]``, the norm of the new residual.

    Raises RuntimeError for tensors that do not fit together.
    """
    return _add_rms_norm(residual, update, update_norm, norm, eps, plus_one)


def rotate_to_cache(
    projected: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    places: Tensor,
    caches: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
) -> Tensor:
    """Gives queries and keys their norms and their rotary embedding, and writes keys and values to a cache.

    Args:
        projected: ``[B * R, (Hq + 2 * Hkv) * D]``, the output of the packed projections: queries, keys, values.
            Its rows may lie apart.
        k_cache, v_cache: ``[N, Hkv, S, D]`` of projected's dtype, the last dimension contiguous; written in place.
        positions: int64 ``[B, R]``, by which a row is rotated. A padded row's is negative.
        places: int64 ``[B, R]``, where in its cache a row's key and value go; negative: nowhere.
        caches: int32 ``[B]``, which of the N caches the rows of an entry use.
        cos, sin: ``[P, A]`` float32 (float64 for float64), tables over positions. The first 2 * A dimensions of a head
            are rotated, i together with i + A.
        q_norm, k_norm: ``[D]``, the weights of RMS norms over the heads, before the rotation. None for none.
        eps, plus_one: as in ``add_rms_norm``.

    Returns:
        The queries ``[B, Hq, R, D]``, which lie in memory as ``[B, R, Hq, D]``.

    Raises RuntimeError for tensors that do not fit together, and on the CPU for a position or place that does not
    exist. On a GPU such a place is not written, and such a position is the last one.
    """
    return _rotate_to_cache(
        projected, k_cache, v_cache, positions, places, caches, cos, sin, q_norm, k_norm, eps, plus_one
    )


def gated(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """``activation(gate) * up``, the middle of a gated MLP: ``[T, 2 * I]``, gate before up, to ``[T, I]``.

    activation: "silu" (SwiGLU) or "gelu_tanh" (Gemma's GELU). The rows of gate_up may lie apart.

    Raises ValueError for another activation and RuntimeError for a tensor of another form.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated: activation is {activation!r}; {' and '.join(map(repr, ACTIVATIONS))} are supported")
    return _gated(gate_up, ACTIVATIONS.index(activation))


def add_halves(
    product: Tensor,
    inner: Tensor,
    halves: Tensor,
    ends: Sequence[int],
    places: Sequence[int],
    *,
    entries: int = 1,
    first: int = 0,
    activation: str | None = None,
) -> Tensor:
    """Adds the B halves of a LoRA adapter to a product whose rows have passed its A halves.

    Args:
        product: ``[B * R, N]``, bfloat16 or float16, on the CPU also float32 and float64. It is written in place,
            unless there is an activation. Its rows may lie apart, as those of ``inner``.
        inner: ``[B * R, I]``, the results of the A halves.
        halves: ``[N, r]``, contiguous, r one of HALVES_RANKS. No kernel that still runs may write them.
        ends: where each of 1 to 3 projections ends in the N columns, a multiple of HALVES_COLUMNS.
        places: the first of the r columns of ``inner`` that each projection takes, a multiple of 8.
        entries: B. Of the R rows of an entry, those from ``first`` on have the adapter.
        activation: as in ``gated``. The two halves of the columns are then gate and up.

    Sums are in float32 (float64 for float64) and are rounded once.

    Returns:
        ``product``, or with an activation ``activation(gate) * up`` of the sums, ``[B * R, N / 2]``.

    Raises RuntimeError for tensors that do not fit together, or do not begin at multiples of 16 bytes.
    """
    gate = 0 if activation is None else 1 + ACTIVATIONS.index(activation)
    out = _add_halves(product, inner, halves, ends, places, entries, first, gate)
    return product if activation is None else out


def run_layers(
    hidden: Tensor,
    weights: Sequence[Tensor],
    kinds: Sequence[int],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    positions: Sequence[Tensor],
    places: Sequence[Tensor],
    pages: Sequence[Tensor],
    tables: Sequence[Tensor],
    rotary: Sequence[Tensor],
    masks: Sequence[IntervalMask],
    *,
    forms: Sequence[int] = (),
    taps: Sequence[int] = (),
    eps: float,
    plus_one: bool,
    activation: str,
    scale: float,
    softcap: float | None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs rows through layers of a model, and adds their keys and values to the caches.

    A layer is `linear`, `rotate_to_cache`, `block_attn_decode`, `linear`, `linear` and `linear`; the results are theirs
    to the bit. Nothing of Python stands between them: on the CPU threads are woken once, and the host of a GPU takes
    microseconds to launch a kernel.

    Args:
        hidden: ``[B * R, H]``, contiguous; on a GPU bfloat16 or float16, with H a multiple of 8.
        weights: those of the first layer in the order of WEIGHTS, then those of the next. An empty tensor is none.
        kinds: the kind of each layer, by its place in the arguments below.
        k_caches, v_caches: of each layer, ``[N, Hkv, S, D]``, as in ``rotate_to_cache``; written in place.
        positions, places, pages: of each kind, int64 ``[E, B * R / E]`` twice and int32 ``[E]``, as positions, places
            and caches in ``rotate_to_cache``.
        tables: of each kind, int32 ``[B, pages]``, the block table of ``block_attn_decode``.
        rotary: cos and sin of the first kind, then of the next.
        masks: of each kind, over ``kv_len`` keys. On a GPU they may be planned.
        forms: on a GPU, how each layer's four products are computed, as `linear.product_form` says; else empty.
        taps: the layers whose outputs are wanted.
        eps, plus_one: of all norms. activation: of the gate. scale, softcap: of the attention's scores.
        exact: as in `linear` and `block_attn_decode`.

    On a GPU it promises what `constant_weight` and `constant_context` do in these operators.

    Returns:
        The output of the last layer ``[B * R, H]``, and those of ``taps``, ``[B * R, taps, H]``.

    Raises RuntimeError for tensors that do not fit together.
    """
    bounds = [bound for mask in masks for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi)]
    plans = [hidden.new_empty(0) if mask.tiles is None else mask.tiles for mask in masks]
    where = positions, places, pages, tables, rotary, bounds, masks[0].kv_len, plans
    options = forms, taps, eps, plus_one, 1 + ACTIVATIONS.index(activation), scale, softcap, exact
    outputs = _run_layers(hidden, weights, kinds, k_caches, v_caches, *where, *options)
    if hidden.is_cuda:
        warn_of_portable_kernels(hidden.device)
    return outputs


@torch.library.register_fake("dflash_ext::add_rms_norm")
def _(residual, update, update_norm, norm, eps, plus_one):
    return torch.empty_like(residual)


@torch.library.register_fake("dflash_ext::rotate_to_cache")
def _(projected, k_cache, v_cache, positions, *others):
    heads = projected.shape[1] // k_cache.shape[3] - 2 * k_cache.shape[1]
    return projected.new_empty(*positions.shape, heads, k_cache.shape[3]).transpose(1, 2)


@torch.library.register_fake("dflash_ext::gated")
def _(gate_up, activation):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.register_fake("dflash_ext::add_halves_")
def _(product, inner, halves, ends, places, entries, first, gate):
    return product.new_empty(len(product) if gate else 0, product.shape[1] // 2)


@torch.library.register_fake("dflash_ext::run_layers")
def _(hidden, *others):
    taps = others[13]
    return torch.empty_like(hidden), hidden.new_empty(len(hidden), len(taps), hidden.shape[1])
