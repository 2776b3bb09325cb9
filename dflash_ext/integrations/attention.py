"""``attn_implementation="block_attn"``: interval-masked attention inside the models of transformers.

``register`` adds two functions to transformers' registries. Models call ``interval_attention_mask`` once per forward
and kind of layer. It writes the two key intervals of each row into an int32 tensor ``[B, 1, Lq, 4]``, which models hand
on like any 4-D mask. Every layer calls ``block_attention``, which reads the intervals back.

Neither function waits for the device, so that a GPU is never idle because of the host. The exceptions are the user's
own 4-D masks and mask functions that look up where a key belongs (packed documents, image blocks). These are checked on
the host, once per forward.

``generate`` takes 2-D padding masks only and refuses ``interval_mask`` by name. To continue a prompt that is read under
an IntervalMask, run the model on all of the prompt but its last token, with ``interval_mask`` and a cache. Then call
``generate`` on the whole prompt with that cache (the argument is ``cache``, before transformers 5.24
``past_key_values``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..masks import IntervalMask
from ..ops import block_attn, block_attn_decode
from .mask_functions import visible_run

NAME = "block_attn"
DECODE_ROWS = 256  # block_attn_decode serves at most this number of rows against a cache: a token, a block, a canvas
REFUSED = {
    "output_attentions": "output_attentions: the attention weights are never formed",
    "position_bias": "a position bias",
    "cache": "the paged cache of continuous batching",
}

# The same tensor reaches every layer of a forward. The first layer reads (and checks) its intervals. The tensor's
# version is kept with each mask, so that a tensor that was written to since then is read again.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register() -> None:
    """Makes ``"block_attn"`` an attention implementation of transformers, in models loaded before or after:
    ``from_pretrained(..., attn_implementation="block_attn")`` or ``model.set_attn_implementation("block_attn")``.

    From then on, models with another implementation raise ValueError if they are given an ``interval_mask``, which they
    would ignore. transformers has no place for such a check, so ``PreTrainedModel.__call__`` is set, unless another
    library has set it.

    Importing ``dflash_ext.integrations`` calls this function. Calling it again changes nothing.
    """
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, interval_attention_mask)
    if "__call__" not in vars(PreTrainedModel):
        PreTrainedModel.__call__ = _call


@contextmanager
def runs_block_attn(modules: Iterable) -> Iterator[None]:
    """Lets modules of transformers, or what else has their config, run with `block_attn`."""
    configs = {id(module.config): module.config for module in modules}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def as_attention_mask(mask: IntervalMask) -> Tensor:
    """``mask`` as an int32 tensor ``[B, 1, Lq, 4]`` that models running ``block_attn`` take as ``attention_mask``.

    It is needed where a forward takes its masks by name (DiffusionGemma's ``decoder_attention_mask``, a dict by kind of
    layer). Elsewhere ``interval_mask=mask`` does the same.
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
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor:
    """The mask function of ``block_attn``; the arguments are those of ``transformers.masking_utils.sdpa_mask``.

    Functions that only compare rows with keys (causal, bidirectional, sliding windows, chunks, and intersections of
    these) take O(B * (Lq + Lk)) under any padding, and nothing waits for the device. Any other function (packed
    documents, image blocks, a user's own) is evaluated for all pairs of row and key, as for SDPA. If it does not depend
    on the batch entry, it is evaluated once for all entries. Under torch.compile, windows and chunks are evaluated in
    this way, too, because the trace cannot follow ``visible_run`` into a composed function.

    Returns:
        int32 ``[B or 1, 1, Lq, 4]``, always: causality is never left to ``is_causal``.

    Raises ValueError, which names the first such row, for a mask that is not of interval form. Padding with holes is
    checked on the device on a GPU and under torch.compile, because an error would have to wait for it: there a row that
    sees more than two runs of keys fails an assertion.
    """
    row = torch.arange(q_length, device=device) + q_offset
    padding = None
    if attention_mask is not None:
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])  # slots of a static cache not yet filled
        padding = nn.functional.pad(attention_mask.to(device, torch.bool), (0, missing))
    run = None if use_vmap else _run(mask_function, batch_size, row)
    if run is not None:
        first, end = ((key - kv_offset).clamp(0, kv_length) for key in run)
        if padding is None:
            nothing = torch.zeros_like(first)
            return as_attention_mask(IntervalMask(*(x.int() for x in (first, end, nothing, nothing)), kv_length))
        mask = _under_padding(padding[:, kv_offset : kv_offset + kv_length], first, end)
        if mask is not None:
            return as_attention_mask(mask)
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
    return as_attention_mask(_unpack(_packed_from_dense(visible if visible.stride(0) else visible[:1]), kv_length))


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
    block_table: dict[int, Tensor] | None = None,
    context_states: Sequence[tuple[Tensor, Tensor]] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of ``block_attn``, with the arguments that transformers' attention modules pass.

    Args:
        query: ``[B, Hq, Lq, D]``; key, value: ``[B, Hkv, Lk, D]``, heads not repeated.
        attention_mask: what ``interval_attention_mask`` or ``as_attention_mask`` made; or a mask of the user's own,
            bool (True: visible) or additive, ``[B or 1, 1, Lq, Lk]``, of interval form. Without a mask, attention is
            causal (within ``sliding_window``, if given) if ``is_causal`` is True; the default of the latter is
            ``module.is_causal``. Otherwise all keys are visible.
        softcap: as in ``dflash_ext.block_attn`` (Gemma 2).
        s_aux: ``[Hq]``, a logit per head that takes part in the softmax and adds nothing (the sinks of gpt-oss).
        interval_mask: an argument of the model's forward. It replaces the mask that the model makes, so it must hide
            the padding, too. A dict has a mask for each kind of layer ("full_attention", "sliding_attention",
            "chunked_attention"). A single mask for all layers may have no more keys than the window of sliding layers
            or the chunk of chunked ones.
        block_table: an argument of the model's forward, if ``key`` and ``value`` are pages ``[pages, Hkv, size, D]``:
            by the size of a page, the block table int32 ``[B, pages]`` of ``dflash_ext.block_attn_decode``.
        context_states: an argument of the model's forward: for each layer the keys and values ``[B, Hkv, S, D]`` of
            tokens that were read before. They stand before the keys of the rows, and ``interval_mask`` counts them.
            Unlike a cache they are only read, so that layers may be computed again in the backward.

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
    if context_states is not None:
        earlier_key, earlier_value = context_states[module.layer_idx]
        key, value = torch.cat([earlier_key, key], dim=2), torch.cat([earlier_value, value], dim=2)
    table = None if block_table is None else block_table[key.shape[2]]
    kv_len = key.shape[2] if table is None else key.shape[2] * table.shape[1]
    if interval_mask is not None:
        mask = _given(module, interval_mask, attention_mask, sliding_window)
    elif attention_mask is not None:
        mask = _read(attention_mask, kv_len)
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _default(query.shape[2], key.shape[2], causal, sliding_window, query.device)
    if table is not None:
        if s_aux is None and value.shape == key.shape:
            pages = key.transpose(1, 2), value.transpose(1, 2)
            out = block_attn_decode(query, *pages, mask, block_table=table, scale=scaling, softcap=softcap)
            return out.transpose(1, 2).contiguous(), None
        key, value = gathered(key, table), gathered(value, table)
    if s_aux is None:
        out = _attend(query, key, value, mask, scale=scaling, softcap=softcap)
    else:
        out, lse = block_attn(query, key, value, mask, scale=scaling, softcap=softcap, return_lse=True)
        # The share of the softmax that the keys keep beside the sink: e^lse / (e^lse + e^sink).
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def gathered(pages: Tensor, table: Tensor) -> Tensor:
    """The keys or values ``[B, Hkv, S, D]`` of rows whose pages ``[pages, Hkv, size, D]`` a block table names."""
    return pages[table].transpose(1, 2).flatten(2, 3)


def _call(model: PreTrainedModel, *args, **kwargs):
    """Replaces ``PreTrainedModel.__call__`` and refuses an interval_mask that the model would ignore.

    Models hand interval_mask on to their layers. The attention functions of other implementations take any keyword and
    use only those that they know."""
    if kwargs.get("interval_mask") is not None:
        implementation = model.config.get_text_config(decoder=True)._attn_implementation
        if implementation != NAME:
            raise ValueError(
                f"{type(model).__name__}: interval_mask was given, but the attention implementation is "
                f"{implementation!r}, which ignores it; call model.set_attn_implementation({NAME!r})"
            )
    return super(PreTrainedModel, model).__call__(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask, **scaling: float | None) -> Tensor:
    """Calls ``block_attn``, or ``block_attn_decode`` for few rows that need no gradient."""
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_cached = query.shape[2] <= DECODE_ROWS and query.shape[2] != key.shape[2]
    if differentiated or not is_cached or value.shape != key.shape:
        return block_attn(query, key, value, mask, **scaling)
    return block_attn_decode(query, key, value, mask, **scaling)


def _run(mask_function: Callable, batch_size: int, row: Tensor) -> tuple[Tensor, Tensor] | None:
    """``visible_run``, which under torch.compile is called for the plain functions alone."""
    if torch.compiler.is_compiling() and mask_function not in (causal_mask_function, bidirectional_mask_function):
        return None
    return visible_run(mask_function, batch_size, row)


def _under_padding(token: Tensor, first: Tensor, end: Tensor) -> IntervalMask | None:
    """The mask of rows that see the tokens among the keys in [first, end). Both are int64 [B or 1, Lq].

    token: bool [B, Lk], False for padding. On the CPU, None is returned if a row sees more than two runs of keys.
    """
    batch, kv_len = token.shape
    first, end = (key.expand(batch, -1) for key in (first, end))
    key = torch.arange(kv_len, device=token.device)
    next_token, next_padding = (
        # For each key, the first of those keys at or after it, or kv_len if there is none.
        nn.functional.pad(torch.where(there, key, kv_len), (0, 1), value=kv_len).flip(-1).cummin(-1).values.flip(-1)
        for there in (token, ~token)
    )
    edges = [next_token.gather(-1, first)]
    for following in (next_padding, next_token, next_padding, next_token):
        edges.append(following.gather(-1, edges[-1]))
    fits = (edges.pop() >= end).all()
    if not torch.compiler.is_compiling() and token.is_cpu:
        if not fits:
            return None
    else:
        torch._assert_async(fits, "block_attn: padding cuts the keys of a row into more than two runs")
    return IntervalMask(*(torch.minimum(edge, end).int() for edge in edges), kv_len)


def _given(
    module: nn.Module,
    given: IntervalMask | dict[str, IntervalMask],
    attention_mask: Tensor | None,
    sliding_window: int | None,
) -> IntervalMask:
    """The mask that the user's interval_mask has for this layer."""
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        raise ValueError("block_attn: interval_mask and a 4-D attention_mask were both given; one is needed")
    config, kind = getattr(module, "config", None), getattr(module, "layer_type", None)
    kinds = getattr(config, "layer_types", None)
    # The layer's number is read only where it counts, because torch.compile makes a graph for every number.
    if kind is None and kinds and getattr(module, "layer_idx", None) is not None:
        kind = kinds[module.layer_idx]
    elif kind is None:
        kind = "sliding_attention" if sliding_window else "full_attention"
    mask = given.get(kind) if isinstance(given, dict) else given
    if not isinstance(mask, IntervalMask):
        raise ValueError(
            f"block_attn: interval_mask for {kind} is {type(mask).__name__}; "
            "an IntervalMask, or a dict that has one for each kind of layer, is needed"
        )
    reach = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else sliding_window
    if mask is given and reach is not None and mask.kv_len > reach:
        raise ValueError(
            f"block_attn: one interval_mask over {mask.kv_len} keys was given to {kind} layers, which see at most "
            f"{reach}; pass a dict with a mask for each kind of layer"
        )
    return mask


def _default(q_len: int, kv_len: int, causal: bool, window: int | None, device: torch.device) -> IntervalMask:
    """The mask of a layer to which none was given."""
    if not causal:
        return IntervalMask.full(kv_len, q_len=q_len, device=device)
    if q_len not in (1, kv_len):
        raise ValueError(
            f"block_attn: causal attention of {q_len} rows over {kv_len} keys without a mask; "
            "attention_mask or interval_mask is needed to give the rows' positions"
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
    """An operator, because it reads the values of its input. A compiled graph can do that only inside an operator."""
    return _pack(IntervalMask.from_dense(mask))


@_packed_from_dense.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], 1, mask.shape[2], 4, dtype=torch.int32)


def _is_tracked(tensor: Tensor) -> bool:
    """Whether writes to the tensor can be noticed. They cannot under inference_mode, nor while a graph is traced."""
    return not (torch.compiler.is_compiling() or tensor.is_inference())
