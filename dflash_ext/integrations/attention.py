"""``attn_implementation="block_attn"``: interval-masked attention inside the models of transformers.

``register`` adds two functions to transformers' registries. ``interval_attention_mask`` is asked for a mask once per
forward and kind of layer, and writes the two key intervals of each row into an int32 tensor ``[B, 1, Lq, 4]``, which
models hand on like any 4-D mask. ``block_attention`` is called by every layer and reads them back.

``generate`` takes no masks but 2-D padding: it refuses ``interval_mask`` by name. To go on behind a prompt that is read
under an IntervalMask, run the model on all of the prompt but its last token, with ``interval_mask`` and a cache, and
call ``generate`` on the whole prompt with that cache (``cache``, before transformers 5.24 ``past_key_values``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..masks import IntervalMask
from ..ops import block_attn

NAME = "block_attn"
REFUSED = {
    "output_attentions": "output_attentions: the attention weights are never formed",
    "position_bias": "a position bias",
    "cache": "the paged cache of continuous batching",
}

# The same tensor reaches every layer of a forward: its intervals are read (and checked) by the first. With each mask
# goes the version of its tensor, so that one that was written to since is read again.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register() -> None:
    """Makes ``"block_attn"`` an attention implementation of transformers, in models loaded before or after:
    ``from_pretrained(..., attn_implementation="block_attn")`` or ``model.set_attn_implementation("block_attn")``.

    Importing ``dflash_ext.integrations`` calls it; calling it again changes nothing.
    """
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, interval_attention_mask)


def as_attention_mask(mask: IntervalMask) -> Tensor:
    """``mask`` as an int32 tensor ``[B, 1, Lq, 4]`` that models running ``block_attn`` take as ``attention_mask``.

    Needed where a forward takes its masks by name (DiffusionGemma's ``decoder_attention_mask``, a dict by kind of
    layer); elsewhere ``interval_mask=mask`` does the same.
    """
    packed = _pack(mask)
    if _is_tracked(packed):
        _known[packed] = packed._version, mask
    return packed


def interval_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """The mask function of ``block_attn``; the arguments are those of ``transformers.masking_utils.sdpa_mask``.

    Causal, sliding-window and bidirectional masks with padding on either side cost O(B * (Lq + Lk)). Any other function
    (packed documents, image blocks, padding with holes) is evaluated for all pairs of row and key, as for SDPA, and for
    each batch entry only if it tells them apart.

    Returns:
        int32 ``[B or 1, 1, Lq, 4]``, always: causality is never left to ``is_causal``.

    Raises ValueError, naming the first row, for a mask that is not of interval form.
    """
    padding, start, stop = None, 0, kv_length
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])  # slots of a static cache not yet filled
        padding = nn.functional.pad(attention_mask.to(device, torch.bool), (0, missing))
        if run := _only_run(padding[:, kv_offset : kv_offset + kv_length]):
            padding, (start, stop) = None, run

    row = torch.arange(q_length, device=device) + q_offset
    window = local_size if allow_is_causal_skip else None
    keys = None if padding is not None else _elementary(mask_function, row, kv_offset + kv_length, window)
    if keys is not None:
        first, end = ((key - kv_offset).int()[None] for key in keys)
        nothing = torch.zeros_like(end)
        mask = IntervalMask(first, end, nothing, nothing, kv_length)
    else:
        visible = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            padding,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        # An expanded batch has stride 0.
        mask = _unpack(_packed_from_dense(visible if visible.stride(0) else visible[:1]), kv_length)
    bounds = (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi)
    return as_attention_mask(IntervalMask(*(bound.clamp(start, stop) for bound in bounds), kv_length))


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    interval_mask: IntervalMask | dict[str, IntervalMask] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of ``block_attn``, with the arguments that transformers' attention modules pass.

    Args:
        query: ``[B, Hq, Lq, D]``; key, value: ``[B, Hkv, Lk, D]``, heads not repeated.
        attention_mask: what ``interval_attention_mask`` or ``as_attention_mask`` made; or a mask of the user's own,
            bool (True: visible) or additive, ``[B or 1, 1, Lq, Lk]``, of interval form; or None, which is causal where
            ``is_causal`` (else ``module.is_causal``) says so, within ``sliding_window`` if given, and sees all
            otherwise.
        softcap: as in ``dflash_ext.block_attn`` (Gemma 2).
        s_aux: ``[Hq]``, a logit per head that takes part in the softmax and adds nothing (the sinks of gpt-oss).
        interval_mask: given to the model's forward, replaces the mask that the model makes, padding included. A dict
            goes by kind of layer ("full_attention", "sliding_attention"). One mask for all layers must reach no
            further than the window of sliding layers.

    Returns:
        ``[B, Lq, Hq, D]``, and None for the weights.

    Raises ValueError for a mask that is not of interval form or does not fit, for two masks, for dropout, and for what
    ``REFUSED`` lists.
    """
    if dropout:
        raise ValueError(f"block_attn: attention dropout is {dropout}; 0 is supported (set config.attention_dropout)")
    for name, meaning in REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"block_attn does not support {meaning}")
    if interval_mask is not None:
        mask = _given(module, interval_mask, attention_mask, sliding_window)
    elif attention_mask is not None:
        mask = _read(attention_mask, key.shape[2])
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _default(query.shape[2], key.shape[2], causal, sliding_window, query.device)
    if s_aux is None:
        out = block_attn(query, key, value, mask, scale=scaling, softcap=softcap)
    else:
        out, lse = block_attn(query, key, value, mask, scale=scaling, softcap=softcap, return_lse=True)
        # The share of the softmax that the keys keep beside the sink: e^lse / (e^lse + e^sink).
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _only_run(keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where the visible ones of the keys, bool [B, Lk], start and stop, int32 [B, 1] each; None where some row has
    holes, or while a graph is traced and nothing can be known."""
    start = keys.int().argmax(-1, keepdim=True)
    stop = start + keys.sum(-1, keepdim=True)
    key = torch.arange(keys.shape[1], device=keys.device)
    if torch.compiler.is_compiling() or not torch.equal(keys, (key >= start) & (key < stop)):
        return None
    return start.int(), stop.int()


def _elementary(mask_function: Callable, row: Tensor, kv_end: int, window: int | None) -> tuple[Tensor, Tensor] | None:
    """The first key of each row and the one after its last, [Lq] each, under the patterns of which transformers
    composes masks: bidirectional, causal, sliding window; None for anything else.

    A window comes with transformers' word that the function is causal and local, which is a sliding window or chunks:
    the keys at the window's two edges tell, in every row.
    """
    if mask_function is bidirectional_mask_function:
        return torch.zeros_like(row), torch.full_like(row, kv_end)
    if mask_function is causal_mask_function:
        return torch.zeros_like(row), row + 1
    if window is None or torch.compiler.is_compiling():
        return None
    edges = row[:, None] + torch.tensor([-window, 1 - window, 0, 1], device=row.device)
    zero = row.new_zeros(1, 1, 1, 1)
    seen = mask_function(zero, zero, row[None, None, :, None], edges[None, None])
    inside = torch.tensor([False, True, True, False], device=row.device)
    return (row + 1 - window, row + 1) if torch.equal(seen, inside.expand_as(seen)) else None


def _given(
    module: nn.Module,
    given: IntervalMask | dict[str, IntervalMask],
    attention_mask: Tensor | None,
    sliding_window: int | None,
) -> IntervalMask:
    """The layer's own of the masks that the user gave as interval_mask."""
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        raise ValueError("block_attn: interval_mask and a 4-D attention_mask were both given; one is needed")
    kind = getattr(module, "layer_type", None) or ("sliding_attention" if sliding_window else "full_attention")
    mask = given.get(kind) if isinstance(given, dict) else given
    if not isinstance(mask, IntervalMask):
        raise ValueError(
            f"block_attn: interval_mask for {kind} is {type(mask).__name__}; "
            "an IntervalMask, or a dict that has one for each kind of layer, is needed"
        )
    if mask is given and sliding_window is not None and mask.kv_len > sliding_window:
        raise ValueError(
            f"block_attn: one interval_mask over {mask.kv_len} keys was given to layers with a window of "
            f"{sliding_window}; pass a dict with a mask each for full_attention and sliding_attention"
        )
    return mask


def _default(q_len: int, kv_len: int, causal: bool, window: int | None, device: torch.device) -> IntervalMask:
    """The mask of a layer that was given none."""
    if not causal:
        return IntervalMask.full(kv_len, q_len=q_len, device=device)
    if q_len not in (1, kv_len):
        raise ValueError(
            f"block_attn: causal attention of {q_len} rows over {kv_len} keys without a mask; "
            "attention_mask or interval_mask is needed to say where the rows stand"
        )
    return IntervalMask.decode(kv_len - q_len, q_len, causal=True, window=window, device=device)


def _read(attention_mask: Tensor, kv_len: int) -> IntervalMask:
    """The intervals of a packed or dense mask; the same object for every layer of a forward."""
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"block_attn: attention_mask is a {type(attention_mask).__name__}; a tensor is supported")
    if not _is_tracked(attention_mask):
        return _convert(attention_mask, kv_len)
    version, mask = _known.get(attention_mask, (None, None))
    if version != attention_mask._version:
        mask = _convert(attention_mask, kv_len)
        _known[attention_mask] = attention_mask._version, mask
    return mask


def _convert(attention_mask: Tensor, kv_len: int) -> IntervalMask:
    if attention_mask.dim() == 4:
        if attention_mask.dtype == torch.int32 and attention_mask.shape[1] == 1 and attention_mask.shape[3] == 4:
            return _unpack(attention_mask, kv_len)
        if attention_mask.dtype == torch.bool or attention_mask.is_floating_point():
            return _unpack(_packed_from_dense(attention_mask), attention_mask.shape[3])
    raise ValueError(
        f"block_attn: attention_mask is {attention_mask.dtype} {list(attention_mask.shape)}; "
        "bool or floating [B, 1, Lq, Lk] is supported"
    )


def _pack(mask: IntervalMask) -> Tensor:
    return torch.stack((mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi), dim=-1)[:, None]


def _unpack(packed: Tensor, kv_len: int) -> IntervalMask:
    return IntervalMask(*(bound.clamp(max=kv_len) for bound in packed[:, 0].unbind(-1)), kv_len)


@torch.library.custom_op("dflash_ext::packed_from_dense", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def _packed_from_dense(mask: Tensor) -> Tensor:
    """An operator, because it looks at the values, which a compiled graph can do only inside of one."""
    return _pack(IntervalMask.from_dense(mask))


@_packed_from_dense.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], 1, mask.shape[2], 4, dtype=torch.int32)


def _is_tracked(tensor: Tensor) -> bool:
    """Whether writes to the tensor can be seen: not under inference_mode, nor while a graph is traced."""
    return not (torch.compiler.is_compiling() or tensor.is_inference())
