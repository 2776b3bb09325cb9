"""Attention under an IntervalMask: for training and prefill, and against a cache."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .. import reference
from ..arguments import check_one_device, checked, shown
from ..library import load
from ..masks import IntervalMask, check_head_dim
from .autograd import refuse_forward_mode, refuse_second_derivative
from .devices import autocast
from .serving import warn_of_portable_kernels, warn_once

load()
_native = torch.ops.dflash_ext

_GPU_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PAGES = "[pages, page_size, Hkv, D]"  # the layout of a paged cache


@checked
def block_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(q k^T * scale)) v over the keys that ``mask`` shows to each row. Differentiable.

    Args:
        q: ``[B, Hq, Lq, D]``, floating; D a multiple of 8, at most 512; last dimension contiguous.
        k, v: ``[B, Hkv, Lk, D]`` of q's dtype; Hkv divides Hq, and query head h reads key head h * Hkv // Hq.
        mask: Lq rows over Lk keys, for the B entries of the batch or for one that serves all, on q's device.
        scale: D ** -0.5 unless given.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2); None for none.
        deterministic: gradients that have the same bits in every run.
        return_lse: also the natural log of each row's sum of exp(scores), which carries a gradient too.

    Returns:
        ``[B, Hq, Lq, D]`` in q's dtype; with return_lse also float32 (float64 for float64) ``[B, Hq, Lq]``.
        A row that sees no key gives 0, an LSE of -inf, and zero gradients.

    k and v must be finite: the kernels work on tiles, and what is not finite in a value reaches other rows of its tile.
    Sums are in float32, in float64 for float64. On the CPU the result does not depend on the number of threads,
    and gradients are always deterministic. Under autocast q, k and v are cast to its dtype.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type.
    """
    _check_places("block_attn", mask, q=q, k=k, v=v)
    refuse_forward_mode("block_attn", q, k, v)
    q, k, v = autocast(q, k, v)
    _check("block_attn", q, {"k": k, "v": v}, "[B, Hkv, Lk, D]", mask, scale, softcap)
    if k.shape[2] != mask.kv_len:
        raise ValueError(f"block_attn: the mask is over {mask.kv_len} keys, k has {k.shape[2]}")
    if not q.is_cuda or q.dtype in _GPU_DTYPES:
        tiles = mask.tiles_for(q.shape[1], k.shape[1], q.shape[3])
        scaling = _scaling(q, scale, softcap)
        out, lse = _native.block_attn(q, k, v, *_bounds(mask), tiles, *scaling, deterministic)
        warn_of_portable_kernels(q.device)
        return (out, lse) if return_lse else out
    warn_once("block_attn", q.device)
    if softcap is None and not (return_lse or deterministic):
        return _scaled_dot_product(q, k, v, mask, scale)
    return reference.block_attn(q, k, v, mask, scale=scale, softcap=softcap, return_lse=return_lse)


@checked
def block_attn_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: IntervalMask,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    exact: bool = False,
) -> Tensor:
    """``block_attn`` of a few rows against a key and value cache, for decoding; no gradient.

    Args:
        q: ``[B, Hq, Lq, D]`` as in ``block_attn``.
        k_cache, v_cache: contiguous ``[B, Hkv, S, D]``; or, with block_table, pages
            ``[pages, page_size, Hkv, D]``. The block's own keys are in the cache already. What no
            row of an entry sees is never used, NaN included.
        mask: ``IntervalMask.decode(...)`` with kv_len at most S, or at most max_pages * page_size.
        block_table: int32 ``[B, max_pages]``: entry j is the page of positions
            ``[j * page_size, (j + 1) * page_size)``; entries beyond a row's length may hold -1.
        scale, softcap: as in ``block_attn``.
        exact: a row's result depends, to the bit, on its own query and the keys that it sees, not on the rest of
            the batch, the length or layout of the cache, or the bounds of others. On the CPU that is always so.

    On a GPU entries of block_table that are no page are read as zeros.

    Returns:
        ``[B, Hq, Lq, D]`` in q's dtype, 0 for rows that see no key.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type, and on the CPU
    RuntimeError for an entry of block_table that is no page though a row sees its keys.
    """
    _check_places("block_attn_decode", mask, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    layout = "[B, Hkv, S, D]" if block_table is None else _PAGES
    _check("block_attn_decode", q, caches, layout, mask, scale, softcap)
    if block_table is None:
        capacity = k_cache.shape[2]
    else:
        if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
            raise ValueError(
                f"block_attn_decode: block_table is {shown(block_table)}; int32 [{q.shape[0]}, max_pages] is needed"
            )
        block_table = block_table.contiguous()
        capacity = block_table.shape[1] * k_cache.shape[1]
    if mask.kv_len > capacity:
        raise ValueError(
            f"block_attn_decode: the mask is over {mask.kv_len} keys, the cache has {capacity}: "
            f"k_cache {list(k_cache.shape)} is read as {layout}"
        )
    with torch.no_grad():
        if not q.is_cuda or q.dtype in _GPU_DTYPES:
            kv_heads = k_cache.shape[1 if block_table is None else 2]
            tiles = mask.tiles_for(q.shape[1], kv_heads, q.shape[3], decode=True)
            keys = *_bounds(mask), mask.kv_len, block_table
            scaling = _scaling(q, scale, softcap)
            out = _native.block_attn_decode(q, k_cache, v_cache, *keys, tiles, exact, *scaling)
            warn_of_portable_kernels(q.device)
            return out
        warn_once("block_attn_decode", q.device)
        return reference.block_attn_decode(
            q, k_cache, v_cache, mask, block_table=block_table, scale=scale, softcap=softcap
        )


def _bounds(mask: IntervalMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(bound.contiguous() for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi))


def _scaling(q: Tensor, scale: float | None, softcap: float | None) -> tuple[float, float]:
    """The native operators' trailing arguments."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale), float(softcap or 0.0)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if q.is_cuda and group > 1:
        # There enable_gqa together with a mask would leave only the slowest of PyTorch's kernels.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    visible = mask.to_bool()
    # An empty row attends to everything and is then overwritten, which keeps NaN out of its gradients.
    empty = ~visible.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible | empty, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.masked_fill(empty, 0.0)


def _check_places(op: str, mask: IntervalMask, **tensors: Tensor | None) -> None:
    if not isinstance(mask, IntervalMask):
        raise TypeError(
            f"{op}: mask is {shown(mask)}; an IntervalMask is needed, which IntervalMask.full, causal, "
            "from_dense and others make"
        )
    check_one_device(op, **tensors, mask=mask.ctx_lo)


def _check(
    op: str,
    q: Tensor,
    keys: dict[str, Tensor],
    layout: str,
    mask: IntervalMask,
    scale: float | None,
    softcap: float | None,
) -> None:
    """q [B, Hq, Lq, D] against keys and values, by name, of that layout."""
    tensors = {"q": q} | keys
    (key_name, k), (value_name, v) = keys.items()

    def fail(what: str) -> NoReturn:
        shapes = ", ".join([f"{name} {list(x.shape)}" for name, x in tensors.items()])  # a list for torch.compile
        raise ValueError(f"{op}: {shapes}: {what}; q [B, Hq, Lq, D] and {key_name}, {value_name} {layout} are needed")

    if not q.dim() == k.dim() == v.dim() == 4:
        fail("not four dimensions each")
    paged = layout == _PAGES
    batch, heads, rows, head_dim = q.shape
    kv_heads = k.shape[2 if paged else 1]
    if k.shape != v.shape or head_dim != k.shape[3] or not (paged or batch == k.shape[0]):
        fail("they do not fit" if op == "block_attn" or paged else "they do not fit (pages need a block_table)")
    if mask.q_len != rows or mask.batch not in (1, batch):
        fail(f"the mask is for batch {mask.batch} and {mask.q_len} rows, q has {batch} and {rows}")
    if kv_heads == 0 or heads % kv_heads:
        fail(f"{heads} query heads are no multiple of {kv_heads} key heads")
    check_head_dim(op, head_dim)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"{op}: q is {q.dtype}, {key_name} {k.dtype}, {value_name} {v.dtype}; "
            "float32, bfloat16, float16 or float64 is needed, one for all"
        )
    for name, x in tensors.items():
        if x.stride(3) != 1:
            raise ValueError(f"{op}: the last dimension of {name} has stride {x.stride(3)}; 1 is needed")
    if softcap is not None and not 1e-30 < softcap < 1e30:
        raise ValueError(f"{op}: softcap is {softcap}; it must be positive and of float32's size, or None for none")
    if scale is not None and not -1e30 < scale < 1e30:
        raise ValueError(f"{op}: scale is {scale}; a number of float32's size is needed, or None for D ** -0.5")


# ------------------------------------------------------------------- registration


def _lse_like(q: Tensor) -> Tensor:
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=real)


@torch.library.register_fake("dflash_ext::block_attn")
def _(q, k, v, *mask_and_scaling):
    return torch.empty_like(q), _lse_like(q)


@torch.library.register_fake("dflash_ext::block_attn_plan")
def _(ctx_lo, *rest):
    return ctx_lo.new_empty(torch.library.get_ctx().new_dynamic_size(), 12)


@torch.library.register_fake("dflash_ext::block_attn_backward")
def _(grad_out, grad_lse, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.register_fake("dflash_ext::block_attn_decode")
def _(q, *rest):
    return torch.empty_like(q)


def _keep(ctx, inputs, output):
    *tensors, plan, scale, softcap, deterministic = inputs
    ctx.options = scale, softcap, deterministic
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None and grad_lse is None:
        return (None,) * 11
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = _native.block_attn_backward(grad_out, grad_lse, *inputs, out, lse, *ctx.options)
    return *grads, *[None] * 8


torch.library.register_autograd("dflash_ext::block_attn", _backward, setup_context=_keep)
refuse_second_derivative("block_attn")
