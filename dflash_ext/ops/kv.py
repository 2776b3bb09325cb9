"""Turns context features into the keys and values of all layers, and writes them into the caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..checks import check_numbers, check_tensors, has_integers, shown
from ..native import load
from .backends import warn_once
from .linear import DTYPES, linear

load()
_native = torch.ops.dflash_ext

_MOST_ON_GPU = 512  # the longest head of the CUDA kernel


def kv_inject(
    features: Tensor,
    weight: Tensor,
    k_caches: Iterable[Tensor] | Tensor,
    v_caches: Iterable[Tensor] | Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bias: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_plus_one: bool = False,
    norm_after_rope: bool = False,
    v_norm: bool = False,
    rope_interleaved: bool = False,
    slots: Tensor | None = None,
    block_table: Tensor | None = None,
) -> None:
    """Writes the keys and values of the context into the caches of a drafter's layers, in place. It has no gradient.

    In each layer, a projection with an optional bias gives K and V. K gets its RMS norm and its rotary embedding, and V
    optionally a norm without weight. Both are written in the cache's dtype. One matrix product in the features' dtype
    serves all layers. Everything after it is computed in float32 (in float64 for float64 features).

    Args:
        features: ``[B, S, H]``, the context features, the same for all layers.
        weight: ``[L * 2 * Hkv * D, H]``, the layers' k_proj and v_proj one below the other: K of layer 0, V
            of layer 0, K of layer 1, and so on.
        bias: ``[L * 2 * Hkv * D]`` in the same order, or None.
        k_caches, v_caches: L tensors each, or one with a leading dimension L: contiguous
            ``[B, Hkv, capacity, D]``, or, with block_table, pages ``[pages, page_size, Hkv, D]``.
        positions: int ``[B, S]``, the tokens' positions.
        cos, sin: tables over positions, ``[P, R]``, or ``[L, P, R]`` if layers differ in theta. The first 2 * R
            dimensions are rotated, and the rest is left as it is.
        k_norm: ``[L, D]``, the weights of K's norm; None for no norm.
        norm_eps: the number that is added to the mean square.
        norm_plus_one: multiply by 1 + k_norm instead of k_norm (Gemma).
        norm_after_rope: normalise the rotated key instead of the one before the rotation.
        v_norm: normalise V as well, without a weight (Gemma 4).
        rope_interleaved: rotate the pairs of dimensions 2 * i and 2 * i + 1 instead of i and i + R (neox).
        slots: int ``[B, S]``, the index in the row's cache to which each token is written; the default is its position.
            Tokens with a negative slot are padding and are not written. The slots of a row must differ.
        block_table: int32 ``[B, max_pages]``; slot s is in page ``block_table[b, s // page_size]``.

    On a GPU nothing waits for the device, and the call can be captured in a CUDA graph. What a kernel cannot raise it
    does this way: a token whose slot or page does not exist is not written, and a key whose position does not exist is
    NaN. Float64 and a D above 512 are served there by plain PyTorch.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type, and on the CPU
    RuntimeError for a slot, position or page that does not exist.
    """
    k_caches, v_caches = _by_layer("k_caches", k_caches), _by_layer("v_caches", v_caches)
    layers = len(k_caches)
    if layers == 0 or len(v_caches) != layers:
        raise ValueError(f"kv_inject: {layers} k_caches, {len(v_caches)} v_caches; one per layer is needed")
    check_tensors(
        "kv_inject",
        features=features,
        weight=weight,
        positions=positions,
        cos=cos,
        sin=sin,
        optional={"bias": bias, "k_norm": k_norm, "slots": slots, "block_table": block_table},
        **{f"k_caches[{layer}]": each for layer, each in enumerate(k_caches)},
        **{f"v_caches[{layer}]": each for layer, each in enumerate(v_caches)},
    )
    check_numbers("kv_inject", needed={"norm_eps": norm_eps})
    cache = k_caches[0]
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*k_caches, *v_caches)):
        raise ValueError("kv_inject: a cache requires a gradient; caches are written in place and have none")
    if cache.dim() != 4:
        raise ValueError(f"kv_inject: a cache is {list(cache.shape)}; four dimensions are needed")
    if any(other.shape != cache.shape for other in (*k_caches, *v_caches)):
        raise ValueError("kv_inject: the caches differ in shape; all layers share one")
    for name, caches in (("k_caches", k_caches), ("v_caches", v_caches)):
        for layer, each in enumerate(caches):
            if any(stride == 0 and size > 1 for stride, size in zip(each.stride(), each.shape, strict=True)):
                raise ValueError(
                    f"kv_inject: {name}[{layer}] has strides {each.stride()}; places of their own are needed, because "
                    "caches are written"
                )
    if features.dim() != 3:
        raise ValueError(f"kv_inject: features is {shown(features)}; floating [B, S, H] is needed")
    batch, length, width = features.shape
    kv_heads, head_dim = cache.shape[2 if block_table is not None else 1], cache.shape[3]
    rows = layers * 2 * kv_heads * head_dim
    if cos.dim() not in (2, 3) or (cos.dim() == 3 and cos.shape[0] != layers) or 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"kv_inject: cos is {list(cos.shape)}; [P, R] or [{layers}, P, R], R at most {head_dim // 2}, is needed"
        )
    reals = {"features": features, "weight": weight, "bias": bias, "cos": cos, "sin": sin, "k_norm": k_norm}
    for name, given in reals.items():
        if given is not None and given.dtype not in DTYPES:
            raise ValueError(f"kv_inject: {name} is {given.dtype}; float32, bfloat16, float16 or float64 is needed")
    for name, given in (("positions", positions), ("slots", slots)):
        if given is not None and not has_integers(given):
            raise ValueError(f"kv_inject: {name} is {given.dtype}; an integer dtype is needed")
    for name, given, shape in (
        ("weight", weight, (rows, width)),
        ("bias", bias, (rows,)),
        ("positions", positions, (batch, length)),
        ("slots", slots, (batch, length)),
        ("k_norm", k_norm, (layers, head_dim)),
        ("sin", sin, tuple(cos.shape)),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"kv_inject: {name} is {list(given.shape)}; {list(shape)} is needed")
    if block_table is None and cache.shape[0] != batch:
        raise ValueError(f"kv_inject: the caches are for batch {cache.shape[0]}, features for {batch}")
    if block_table is not None and (
        block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch
    ):
        raise ValueError(f"kv_inject: block_table is {shown(block_table)}; int32 [{batch}, max_pages] is needed")
    dtype = torch.promote_types(features.dtype, weight.dtype)
    real = torch.promote_types(dtype, torch.float32)
    is_wide = [x == torch.float64 for x in (real, cache.dtype, v_caches[0].dtype)]
    if not features.is_cuda and len(set(is_wide)) > 1:
        raise ValueError(f"kv_inject: features are {dtype}, a cache {cache.dtype}; both or neither may be float64")
    positions = _as(positions, torch.int64)
    # The CUDA kernel reads the weights of norms and projections in their own dtype.
    weights = [None if x is None else x.detach().contiguous() if x.is_cuda else _as(x, real) for x in (bias, k_norm)]
    with torch.no_grad(), torch.autocast("cuda" if features.is_cuda else "cpu", enabled=False):
        inject_fitting(
            features.to(dtype).contiguous(),
            weight.to(dtype).contiguous(),
            k_caches,
            v_caches,
            positions,
            positions if slots is None else _as(slots, torch.int64),
            _as(cos, real),
            _as(sin, real),
            *weights,
            _as(block_table, torch.int32),
            norm_eps,
            norm_plus_one,
            norm_after_rope,
            v_norm,
            rope_interleaved,
        )
    _count_writes(*k_caches, *v_caches)


def inject_fitting(
    features: Tensor,
    weight: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    k_norm: Tensor | None,
    block_table: Tensor | None,
    norm_eps: float,
    norm_plus_one: bool = False,
    norm_after_rope: bool = False,
    v_norm: bool = False,
    rope_interleaved: bool = False,
) -> None:
    """`kv_inject` for arguments that are known to fit together, in the form that its kernels read. It checks and casts
    nothing, so that the host is soon done.

    All tensors but the caches are contiguous; features and weight are of one dtype, positions and slots int64, the
    tables float32 (float64 for float64), and on the CPU bias and k_norm, too. Autocast and gradients are off.
    """
    is_wide = torch.float64 in (features.dtype, k_caches[0].dtype, v_caches[0].dtype)
    if features.is_cuda and (is_wide or k_caches[0].shape[3] > _MOST_ON_GPU):
        warn_once("kv_inject", features.device)
        reference.kv_inject(
            *(features, weight, k_caches, v_caches, positions, cos, sin),
            bias=bias,
            k_norm=k_norm,
            norm_eps=norm_eps,
            norm_plus_one=norm_plus_one,
            norm_after_rope=norm_after_rope,
            v_norm=v_norm,
            rope_interleaved=rope_interleaved,
            slots=slots,
            block_table=block_table,
        )
        return
    if not features.is_cuda:
        # A token without a slot may hold anything, which must not reach its neighbours through the product.
        features = features.masked_fill((slots < 0)[..., None], 0.0)
    # Contiguous rows: oneDNN's bfloat16 product reads between the rows too, and lets NaN from there through.
    projected = product(features.flatten(0, 1), weight)
    where = positions, slots, cos, sin, bias, k_norm, block_table
    how = norm_eps, norm_plus_one, norm_after_rope, v_norm, rope_interleaved
    _native.kv_write(projected, k_caches, v_caches, *where, *how)


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` of contiguous ``[T, K]`` and ``[N, K]``, without checks: by `linear` for few rows, and by
    PyTorch's product for many, for which it is the faster one."""
    return linear(rows, weight) if len(rows) <= 32 else rows @ weight.T


def _by_layer(name: str, caches: Iterable[Tensor] | Tensor) -> list[Tensor]:
    if not isinstance(caches, Iterable) or (isinstance(caches, Tensor) and caches.dim() == 0):
        raise TypeError(f"kv_inject: {name} is {shown(caches)}; a tensor for each layer is needed")
    return list(caches)


def _count_writes(*caches: Tensor) -> None:
    """Tells autograd of the writes, so that a backward that saved a cache raises instead of using the new contents."""
    if torch.compiler.is_compiling():
        return
    for cache in caches:
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


@torch.library.register_fake("dflash_ext::kv_write")
def _(projected, *others):
    return None
