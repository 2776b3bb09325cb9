"""Attention under an IntervalMask: for training and prefill, and against a cache."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import reference
from ..checks import check_numbers, check_tensors, shown
from ..masks import BOUNDS, IntervalMask, check_head_dim
from ..native import load
from .autograd import differentiable, differentiable_once, has_no_gradient, refuse_forward_mode
from .backends import warn_of_portable_kernels, warn_once
from .devices import autocast

load()
_block_attn_decode = torch.ops.dflash_ext.block_attn_decode.default

_GPU_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        k: ``[B, Hkv, Lk, D]`` of q's dtype; Hkv divides Hq, and query head h reads key head h * Hkv // Hq.
        v: ``[B, Hkv, Lk, Dv]``, Dv at most D. Narrower values (multi-head latent attention) are padded with zeros, so
            that they take as long as ones of D.
        mask: Lq rows over Lk keys, for the B entries of the batch or for one that serves all, on q's device.
        scale: the factor of the scores; None is D ** -0.5.
        softcap: turns scores into ``softcap * tanh(scores / softcap)`` (Gemma 2); None for none.
        deterministic: whether gradients have the same bits in every run. This may take longer on a GPU.
        return_lse: also return the natural log of each row's sum of exp(scores). It has a gradient, too.

    Returns:
        ``[B, Hq, Lq, Dv]`` in q's dtype; with return_lse also float32 (float64 for float64) ``[B, Hq, Lq]``.
        A row that sees no key has an output of 0, an LSE of -inf, and zero gradients.

    k and v must be finite. The kernels work on tiles, so a value that is not finite can also reach rows that do not see
    it. Sums are computed in float32, and in float64 for float64 inputs. On the CPU the result does not depend on the
    number of threads, and gradients are always deterministic. Under autocast q, k and v are cast to its dtype.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type.
    """
    _check_kinds("block_attn", mask, scale, softcap)
    refuse_forward_mode("block_attn", q, k, v)
    keys = _bounds(mask), mask.kv_len
    try:
        q, k, v = autocast(q, k, v)
        if q.is_cuda and q.dtype not in _GPU_DTYPES:
            _check("block_attn", q, {"k": k, "v": v}, *keys, scale, softcap)
            warn_once("block_attn", q.device)
            return _without_kernel(q, k, v, mask, scale, softcap, deterministic, return_lse)
        tiles = mask.tiles
        if tiles is not None:
            tiles = mask.tiles_for(q.shape[1], k.shape[1], q.shape[3])
        width = v.shape[3]
        values = v if width >= k.shape[3] else pad(v, (0, k.shape[3] - width))
        out, lse = _block_attn(q, k, values, *keys[0], keys[1], tiles, scale, softcap, deterministic)
        out = out if values is v else out[..., :width]
        if q.is_cuda:
            warn_of_portable_kernels(q.device)
        return (out, lse) if return_lse else out
    except Exception as error:
        raise _explained(error, "block_attn", q, {"k": k, "v": v}, *keys, scale, softcap) from None


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
    constant_context: bool = False,
) -> Tensor:
    """``block_attn`` of a few rows against a key and value cache, for decoding. It has no gradient.

    Args:
        q: ``[B, Hq, Lq, D]`` as in ``block_attn``.
        k_cache, v_cache: contiguous ``[B, Hkv, S, D]``; or, with block_table, pages
            ``[pages, page_size, Hkv, D]``. They already hold the block's own keys and values. Keys and values that no
            row of an entry sees are never used, even if they are NaN.
        mask: ``IntervalMask.decode(...)`` with kv_len at most S, or at most max_pages * page_size.
        block_table: int32 ``[B, max_pages]``: entry j is the page of positions
            ``[j * page_size, (j + 1) * page_size)``. Entries beyond a row's length may be -1. On a GPU, an entry that
            is no page is read as a page of zeros.
        scale, softcap: as in ``block_attn``.
        exact: whether the bits of a row's result depend on its own query and the keys that it sees alone, and not on
            the rest of the batch, the length or pages of the cache, or other rows' bounds. On the CPU they always do.
            A layout that only the portable kernel takes (`dflash-ext doctor` lists them) has bits of its own.
        constant_context: the caller promises that the kernel in front of this one in the stream, which may write q and
            the keys and values of its Lq rows, writes neither mask nor block_table, nor keys and values that lie Lq
            places or more before the end of what a row sees. This holds for a decoding step, whose own keys stand
            behind the cached ones. The Hopper kernel then loads cached keys before the kernel in front of it has ended.

    Returns:
        ``[B, Hq, Lq, D]`` in q's dtype, 0 for rows that see no key.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type, and on the CPU
    RuntimeError for an entry of block_table that is no page though a row sees its keys.
    """
    _check_kinds("block_attn_decode", mask, scale, softcap)
    keys = _bounds(mask), mask.kv_len
    try:
        q, k_cache, v_cache = autocast(q, k_cache, v_cache)
        if block_table is not None:
            block_table = block_table.contiguous()
        if q.is_cuda and q.dtype not in _GPU_DTYPES:
            caches = {"k_cache": k_cache, "v_cache": v_cache}
            _check("block_attn_decode", q, caches, *keys, scale, softcap, block_table)
            warn_once("block_attn_decode", q.device)
            options = {"block_table": block_table, "scale": scale, "softcap": softcap}
            return reference.block_attn_decode(q.detach(), k_cache.detach(), v_cache.detach(), mask, **options)
        tiles = mask.tiles
        if tiles is not None:
            kv_heads = k_cache.shape[1 if block_table is None else 2]
            tiles = mask.tiles_for(q.shape[1], kv_heads, q.shape[3], decode=True)
        options = exact, constant_context, scale, softcap
        out = _block_attn_decode(q, k_cache, v_cache, *keys[0], keys[1], block_table, tiles, *options)
        if q.is_cuda:
            warn_of_portable_kernels(q.device)
        return out
    except Exception as error:
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        raise _explained(error, "block_attn_decode", q, caches, *keys, scale, softcap, block_table) from None


def _bounds(mask: IntervalMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi


def _without_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float | None,
    softcap: float | None,
    deterministic: bool,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``block_attn`` in dtypes that the GPU kernels do not have."""
    if softcap is None and not (return_lse or deterministic):
        return _scaled_dot_product(q, k, v, mask, scale)
    return reference.block_attn(q, k, v, mask, scale=scale, softcap=softcap, return_lse=return_lse)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if q.is_cuda and group > 1:
        # On a GPU, only the slowest of PyTorch's kernels takes enable_gqa together with a mask.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    visible = mask.to_bool()
    # An empty row first attends to everything and is then overwritten. This keeps NaN out of its gradients.
    empty = ~visible.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible | empty, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.masked_fill(empty, 0.0)


# ------------------------------------------------------------------------- checks

# The native operators check their arguments themselves, so a call that succeeds pays for no check in Python. `_check`
# runs after an operator has raised, to name the arguments as the public function does. It also runs for calls that
# reach no native operator: those with fake or meta tensors, and dtypes that only plain PyTorch serves.


def _check_kinds(op: str, mask: IntervalMask, scale: float | None, softcap: float | None) -> None:
    """Checks what the native operators cannot. They would read the value of a tensor in the place of a number, and so
    drop its gradient."""
    if not isinstance(mask, IntervalMask):
        raise TypeError(
            f"{op}: mask is {shown(mask)}; an IntervalMask is needed, which IntervalMask.full, causal, "
            "from_dense and others make"
        )
    if isinstance(scale, Tensor) or isinstance(softcap, Tensor):
        check_numbers(op, scale=scale, softcap=softcap)


def _explained(error: Exception, *arguments: object) -> Exception:
    """What `_check` finds in the arguments of a call that failed, or the error itself if it finds nothing."""
    try:
        _check(*arguments)
    except (TypeError, ValueError) as found:
        return found
    return error


def _check(
    op: str,
    q: Tensor,
    keys: dict[str, Tensor],
    bounds: tuple[Tensor, Tensor, Tensor, Tensor],
    kv_len: int,
    scale: float | None,
    softcap: float | None,
    block_table: Tensor | None = None,
) -> None:
    """Raises ValueError or TypeError for what does not fit. keys: the keys and the values, each by its name."""
    tensors = {"q": q} | keys
    (key_name, k), (value_name, v) = keys.items()
    paged = block_table is not None
    layout = "[pages, page_size, Hkv, D]" if paged else f"[B, Hkv, {'Lk' if op == 'block_attn' else 'S'}, D]"

    def fail(what: str) -> NoReturn:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{op}: {shapes}: {what}; q [B, Hq, Lq, D] and {key_name}, {value_name} {layout} are needed")

    check_tensors(op, **tensors, **({"block_table": block_table} if paged else {}), mask=bounds[0])
    check_numbers(op, scale=scale, softcap=softcap)
    if not q.dim() == k.dim() == v.dim() == 4:
        fail("not four dimensions each")
    batch, heads, rows, head_dim = q.shape
    kv_heads = k.shape[2 if paged else 1]
    mask_batch, mask_rows = bounds[0].shape
    narrower = op == "block_attn" and k.dim() == v.dim() and v.shape[3] < k.shape[3]
    values = (*v.shape[:3], k.shape[3]) if narrower else v.shape
    if k.shape != values or head_dim != k.shape[3] or not (paged or batch == k.shape[0]):
        fail("they do not fit" if op == "block_attn" or paged else "they do not fit (pages need a block_table)")
    if mask_rows != rows or mask_batch not in (1, batch):
        fail(f"the mask is for batch {mask_batch} and {mask_rows} rows, q has {batch} and {rows}")
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
    if op == "block_attn":
        if k.shape[2] != kv_len:
            raise ValueError(f"block_attn: the mask is over {kv_len} keys, k has {k.shape[2]}")
        return
    if paged and (block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != batch):
        raise ValueError(f"{op}: block_table is {shown(block_table)}; int32 [{batch}, max_pages] is needed")
    capacity = block_table.shape[1] * k.shape[1] if paged else k.shape[2]
    if kv_len > capacity:
        raise ValueError(
            f"{op}: the mask is over {kv_len} keys, the cache has {capacity}: "
            f"{key_name} {list(k.shape)} is read as {layout}"
        )


# ------------------------------------------------------------------- registration


def _lse_like(q: Tensor) -> Tensor:
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:-1], dtype=real)


@torch.library.register_fake("dflash_ext::block_attn")
def _(q, k, v, ctx_lo, ctx_hi, blk_lo, blk_hi, kv_len, plan, scale, softcap, deterministic):
    _check("block_attn", q, {"k": k, "v": v}, (ctx_lo, ctx_hi, blk_lo, blk_hi), kv_len, scale, softcap)
    return torch.empty_like(q), _lse_like(q)


@torch.library.register_fake("dflash_ext::block_attn_plan")
def _(ctx_lo, *rest):
    return ctx_lo.new_empty(torch.library.get_ctx().new_dynamic_size(), 12)


@torch.library.register_fake("dflash_ext::block_attn_backward")
def _(grad_out, grad_lse, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.register_fake("dflash_ext::block_attn_decode")
def _(q, k, v, ctx_lo, ctx_hi, blk_lo, blk_hi, kv_len, block_table, plan, exact, constant_context, scale, softcap):
    caches, bounds = {"k_cache": k, "v_cache": v}, (ctx_lo, ctx_hi, blk_lo, blk_hi)
    _check("block_attn_decode", q, caches, bounds, kv_len, scale, softcap, block_table)
    return torch.empty_like(q)


def _keep(ctx, inputs, output):
    *tensors, kv_len, plan, scale, softcap, deterministic = inputs
    ctx.options = scale, softcap, deterministic
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    if grad_out is None and grad_lse is None:
        return (None,) * 12
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = _block_attn_backward(grad_out, grad_lse, *inputs, out, lse, *ctx.options)
    warn_of_portable_kernels(out.device)
    return *grads, *[None] * 9


def _as_one_batch(op, info, in_dims: tuple, *inputs) -> tuple:
    """The rule of vmap: the mapped entries join the batch. A mask that serves all of them is not repeated."""
    names = [argument.name for argument in op._schema.arguments]
    given = {name: (x, dim) for name, x, dim in zip(names, inputs, in_dims, strict=True)}
    serves_all = all(dim is None and len(x) == 1 for x, dim in map(given.get, BOUNDS))
    q, q_dim = given["q"]
    batch = q.shape[0 if q_dim is None else int(q_dim == 0)]

    def joined(name: str, x, dim: int | None):
        if name == "plan" or not isinstance(x, Tensor):
            return None if name == "plan" else x
        if name in BOUNDS and serves_all:
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)

    results = op(*(joined(name, *given[name]) for name in names))
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in results), (0,) * len(results)


_block_attn_backward = differentiable_once("block_attn", _as_one_batch)
_block_attn = differentiable("block_attn", _keep, _backward, _as_one_batch)
has_no_gradient("block_attn_decode")
