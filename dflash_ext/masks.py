"""IntervalMask: which keys each query row sees in block diffusion, as two intervals.

In every attention pattern of block diffusion (prefix and block, block-causal, anchors, BD3-LM, decoding against a
cache), a query row sees at most two contiguous runs of keys. So four integers per row describe the mask. They take 16
bytes per row at any length, are computed on the device, and are all that a kernel needs to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.data._utils.collate import default_collate_fn_map

from .checks import check_operands, is_int, shown
from .native import load

Length = int | Tensor
BOUNDS = ("ctx_lo", "ctx_hi", "blk_lo", "blk_hi")
_INTEGERS = (torch.int32, torch.int64)
_LARGEST = (1 << 31) - 1
_FAR = 1 << 30  # beyond every key, and far from where int32 ends
Device = torch.device | str | None

_KNOWN_OFFSETS: dict[tuple, Tensor] = {}

load()
_decode_mask = torch.ops.dflash_ext.decode_mask.default
_DECODE_CONVENTIONS = (None, "zlab", "speculators")  # the native operator takes an index into this


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Query row ``(b, i)`` sees the keys of ``[ctx_lo, ctx_hi)`` and of ``[blk_lo, blk_hi)``.

    ctx_lo, ctx_hi, blk_lo, blk_hi: int32 ``[B, Lq]``. With B = 1 the mask serves all entries of a batch.
    kv_len: Lk, a number that is fixed when the mask is made.

    An interval with lo >= hi is empty. A key in both intervals counts once. The two intervals may be in any order, and
    need not be adjacent. The constructors keep every bound within ``[0, kv_len]``. Bounds that are not contiguous are
    copied, because the kernels need contiguous ones.

    In the constructors a length is an int, or an int32 or int64 tensor ``[B]``. The constructors of self-attention also
    take ``max_len``, the padded length, which is required when ``seq_len`` is a tensor. Positions from ``seq_len`` on
    are padding: their keys are hidden and their rows are empty. A window W means that a key is visible iff
    ``q_pos - k_pos < W``. Nothing of size Lq x Lk is made, and nothing is read back from the device. ``device`` is used
    only if no argument is a tensor.

    tiles, planned_for: set by :meth:`plan` alone. They are no arguments of the constructor, so that
    ``dataclasses.replace`` and everything else that makes a mask from other bounds gives a mask without a plan.
    """

    ctx_lo: Tensor
    ctx_hi: Tensor
    blk_lo: Tensor
    blk_hi: Tensor
    kv_len: int
    tiles: Tensor | None = field(init=False, default=None)
    planned_for: tuple | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_operands("IntervalMask", **dict(zip(BOUNDS, self._bounds(), strict=True)))
        for name in BOUNDS:
            bound = getattr(self, name)
            if bound.dim() != 2 or bound.dtype != torch.int32 or bound.shape != self.ctx_lo.shape:
                raise ValueError(
                    f"IntervalMask: {name} is {shown(bound)}; the four bounds are int32 [B, Lq] of one shape"
                )
            object.__setattr__(self, name, bound.contiguous())
        object.__setattr__(self, "kv_len", _int("__init__", "kv_len", self.kv_len))

    @property
    def batch(self) -> int:
        """The number of batch entries that have a mask of their own; 1 if all have the same."""
        return self.ctx_lo.shape[0]

    @property
    def q_len(self) -> int:
        return self.ctx_lo.shape[1]

    @property
    def device(self) -> torch.device:
        return self.ctx_lo.device

    def to(self, device: Device, *, non_blocking: bool = False) -> IntervalMask:
        """The same mask on another device."""
        return self._of_bounds(lambda bound: bound.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> IntervalMask:
        """The same mask in pinned memory, from which ``to(device, non_blocking=True)`` does not wait for the copy."""
        return self._of_bounds(Tensor.pin_memory)

    def __getitem__(self, entries: int | slice | Tensor) -> IntervalMask:
        """The masks of these entries of the batch. A mask that serves all entries serves any part of them, too.

        Raises IndexError for an entry that does not exist.
        """
        if is_int(entries):
            return self._of_bounds(lambda bound: bound[entries][None])
        return self if self.batch == 1 else self._of_bounds(lambda bound: bound[entries])

    def _of_bounds(self, change: Callable[[Tensor], Tensor]) -> IntervalMask:
        return IntervalMask(*map(change, self._bounds()), self.kv_len)

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.ctx_lo, self.ctx_hi, self.blk_lo, self.blk_hi

    def __reduce__(self) -> tuple:
        """Copies and files hold the bounds alone: a plan belongs to the device and the tensors that it was made for."""
        return IntervalMask, (*self._bounds(), self.kv_len)

    def plan(self, heads: int, kv_heads: int, head_dim: int, *, decode: bool = False) -> IntervalMask:
        """Returns the same mask with the GPU kernels' tile lists, which then serve all layers of these shapes.

        decode: whether the lists are for ``block_attn_decode`` instead of ``block_attn``.

        If a mask has no lists for the shapes of a call, the operator makes them in that call. Making a plan is one
        kernel launch, and nothing is read back. Calls in several streams may share a plan, because no kernel writes to
        it. On the CPU this method returns the mask itself, because the CPU kernels need no lists.

        The planned mask has this mask's bounds, not copies of them. The kernels compare each row's bounds with the
        plan. If bounds were changed in place afterwards, so that the plan would give a wrong result, the row's output
        and its LSE are NaN. This also holds under inference mode and in a replayed CUDA graph. A graph that serves
        changing lengths should therefore make the plan within the graph.

        Raises ValueError for shapes that no attention has.
        """
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"IntervalMask.plan: {heads} query heads are no multiple of {kv_heads} key heads")
        check_head_dim("IntervalMask.plan", head_dim)
        if self.device.type != "cuda":
            return self
        shapes = heads, kv_heads, head_dim, decode
        tiles = torch.ops.dflash_ext.block_attn_plan(*self._bounds(), self.kv_len, *shapes)
        return _from_leaves((*self._bounds(), tiles), (self.kv_len, self._plan_key(*shapes)))

    def tiles_for(self, heads: int, kv_heads: int, head_dim: int, *, decode: bool = False) -> Tensor | None:
        """The tile lists, or None if they were made for other shapes."""
        return self.tiles if self.planned_for == self._plan_key(heads, kv_heads, head_dim, decode) else None

    def _plan_key(self, *shapes: int) -> tuple:
        return (*shapes, self.batch, self.q_len, self.kv_len)

    # ---- self-attention ----------------------------------------------------------------------------------

    @staticmethod
    def full(
        kv_lens: Length, *, q_len: int | None = None, kv_len: int | None = None, device: Device = None
    ) -> IntervalMask:
        """Every row sees the first ``kv_lens`` keys.

        kv_len: Lk. The default is ``kv_lens``, if that is an int.
        q_len: Lq. The default is ``kv_len``.
        """
        device = _device("full", device, kv_lens=kv_lens)
        lens, kv_len = _padded(kv_lens, kv_len, device, "full", "kv_lens", "kv_len")
        q_len = kv_len if q_len is None else _int("full", "q_len", q_len)
        return _intervals(kv_len, q_len, context=(0, lens))

    @staticmethod
    def causal(seq_len: Length, *, max_len: int | None = None, device: Device = None) -> IntervalMask:
        """Row i sees the keys up to i."""
        device = _device("causal", device, seq_len=seq_len)
        lens, max_len = _padded(seq_len, max_len, device, "causal")
        pos = _arange(max_len, device)
        return _intervals(max_len, max_len, context=(0, pos + 1), rows=pos < lens)

    @staticmethod
    def sliding_window(
        seq_len: Length, window: int, *, max_len: int | None = None, device: Device = None
    ) -> IntervalMask:
        """Row i sees the last ``window`` keys up to i, itself included."""
        window = _step("sliding_window", "window", window)
        device = _device("sliding_window", device, seq_len=seq_len)
        lens, max_len = _padded(seq_len, max_len, device, "sliding_window")
        pos = _arange(max_len, device)
        return _intervals(max_len, max_len, context=(pos - window + 1, pos + 1), rows=pos < lens)

    @staticmethod
    def prefix_lm(
        seq_len: Length,
        prefix_len: Length,
        *,
        max_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """Prefix-LM: the prefix is bidirectional, and what follows it is causal."""
        device = _device("prefix_lm", device, seq_len=seq_len, prefix_len=prefix_len)
        lens, max_len = _padded(seq_len, max_len, device, "prefix_lm")
        prefix = _column(prefix_len, device, "prefix_lm", "prefix_len")
        pos = _arange(max_len, device)
        visible = torch.maximum(prefix.minimum(lens), pos + 1)
        return _intervals(max_len, max_len, context=(0, visible), rows=pos < lens)

    @staticmethod
    def prefix_block(
        seq_len: Length,
        prefix_len: Length,
        *,
        max_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """A causal prefix, then one bidirectional block that sees the whole prefix."""
        device = _device("prefix_block", device, seq_len=seq_len, prefix_len=prefix_len)
        lens, max_len = _padded(seq_len, max_len, device, "prefix_block")
        prefix = _column(prefix_len, device, "prefix_block", "prefix_len")
        pos = _arange(max_len, device)
        return _intervals(
            max_len,
            max_len,
            context=(0, torch.minimum(prefix, pos + 1)),
            block=(prefix, torch.where(pos < prefix, 0, lens)),
            rows=pos < lens,
        )

    @staticmethod
    def block_causal(
        seq_len: Length,
        block_size: int,
        prefix_len: Length = 0,
        *,
        max_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """Blocks of ``block_size`` see all earlier blocks and, in both directions, their own.

        The first ``prefix_len`` tokens are causal and belong to no block; the first block starts after them.
        """
        block_size = _step("block_causal", "block_size", block_size)
        device = _device("block_causal", device, seq_len=seq_len, prefix_len=prefix_len)
        lens, max_len = _padded(seq_len, max_len, device, "block_causal")
        prefix = _column(prefix_len, device, "block_causal", "prefix_len")
        pos = _arange(max_len, device)
        start = pos - (pos - prefix) % block_size
        in_prefix = pos < prefix
        return _intervals(
            max_len,
            max_len,
            context=(0, torch.where(in_prefix, pos + 1, start)),
            block=(start, torch.where(in_prefix, 0, torch.minimum(start + block_size, lens))),
            rows=pos < lens,
        )

    @staticmethod
    def block_diffusion(
        seq_len: Length,
        block_size: int,
        *,
        max_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """BD3-LM's training mask (arXiv 2503.09573) over ``[x_t ; x_0]``, so Lq = Lk = 2 * max_len.

        A noised block of x_t sees itself in both directions, and the clean blocks of x_0 before it. A block of x_0 sees
        the clean blocks up to its own.
        """
        block_size = _step("block_diffusion", "block_size", block_size)
        device = _device("block_diffusion", device, seq_len=seq_len)
        lens, max_len = _padded(seq_len, max_len, device, "block_diffusion")
        row = _arange(2 * max_len, device)
        half = row - row % max(max_len, 1)  # where the row's own copy of the sequence begins
        pos = row - half
        start = pos - pos % block_size
        end = torch.minimum(start + block_size, lens)
        return _intervals(
            2 * max_len,
            2 * max_len,
            context=(max_len, max_len + start),
            block=(half + start, half + end.clamp(max=max_len)),
            rows=pos < lens,
        )

    @staticmethod
    def packed(
        cu_seqlens: Sequence[int] | Tensor,
        inner: Callable[..., IntervalMask],
        *,
        total_len: int | None = None,
        max_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """Documents packed into one row, each under its own mask at its own positions.

        cu_seqlens: n + 1 ascending offsets from 0. Document d is ``[cu_seqlens[d], cu_seqlens[d + 1])``.
        inner: makes the documents' self-attention masks, as a batch. It is called once, as
            ``inner(lengths, max_len=max_len)`` with int32 lengths ``[n]``. ``IntervalMask.causal`` can be passed as it
            is. functools.partial adds arguments, which may be tensors ``[n]`` (a prefix length for each document).
        total_len: the length of the row. It is required if cu_seqlens is a tensor, and the last offset otherwise.
            Positions behind the last document are padding.
        max_len: an upper bound of the documents' lengths. The default is the longest one, or total_len if cu_seqlens is
            a tensor.
        """
        if isinstance(cu_seqlens, Tensor):
            total_len = _int("packed", "total_len", total_len)
            if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in _INTEGERS:
                raise ValueError(
                    f"IntervalMask.packed: cu_seqlens is {shown(cu_seqlens)}; int32 or int64 [2] or more is needed"
                )
            max_len = total_len if max_len is None else _int("packed", "max_len", max_len)
            offsets = cu_seqlens.to(torch.int32)
        else:
            given = [_int("packed", "an offset of cu_seqlens", offset) for offset in cu_seqlens]
            if len(given) < 2 or given[0] != 0 or given != sorted(given):
                raise ValueError(
                    f"IntervalMask.packed: cu_seqlens is {given}; two or more ascending offsets from 0 are needed"
                )
            total_len = given[-1] if total_len is None else total_len
            longest = max(b - a for a, b in pairwise(given))
            max_len = longest if max_len is None else _int("packed", "max_len", max_len, least=longest)
            offsets = torch.tensor(given, dtype=torch.int32, device=device)
        total_len, max_len = _int("packed", "total_len", total_len), max(max_len, 1)
        documents, count = inner(offsets.diff(), max_len=max_len), offsets.numel() - 1
        if documents.batch not in (1, count) or (documents.q_len, documents.kv_len) != (max_len, max_len):
            raise ValueError(
                f"IntervalMask.packed: inner made {documents.batch} masks of {documents.q_len} rows over "
                f"{documents.kv_len} keys; {count}, or one for all, of {max_len} over {max_len} are needed"
            )
        pos = _arange(total_len, offsets.device)
        found = torch.searchsorted(offsets[1:], pos, right=True)
        doc = found.clamp(max=count - 1)
        start = offsets[doc]
        local = (pos - start).clamp(max=max_len - 1)
        rows = doc if documents.batch > 1 else torch.zeros_like(doc)
        ctx_lo, ctx_hi, blk_lo, blk_hi = (start + bound[rows, local] for bound in documents._bounds())
        return _intervals(
            total_len,
            total_len,
            context=(ctx_lo, ctx_hi),
            block=(blk_lo, blk_hi),
            rows=found < count,
        )

    @staticmethod
    def from_padding(attention_mask: Tensor) -> IntervalMask:
        """Causal attention under a 2-D padding mask: row i sees the tokens up to i.

        attention_mask: bool, int32 or int64 ``[B, L]``, 1 for a token and 0 for padding, as tokenizers of transformers
        make it. Padding may be on the left, on the right or on both sides. Its rows are empty. On the CPU a mask with
        padding between tokens raises ValueError. On a GPU this check would have to wait for the device, so padding
        between tokens counts as tokens there.

        >>> mask = IntervalMask.from_padding(torch.tensor([[0, 1, 1], [1, 1, 0]]))
        >>> mask.to_bool().int().squeeze(1).tolist()
        [[[0, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [0, 0, 0]]]
        """
        if attention_mask.dim() != 2 or attention_mask.dtype not in (torch.bool, *_INTEGERS):
            raise ValueError(
                f"IntervalMask.from_padding: attention_mask is {shown(attention_mask)}; "
                "bool, int32 or int64 [B, L] is needed"
            )
        batch, length = attention_mask.shape
        token = attention_mask != 0
        start = (token.cumsum(-1) == 0).sum(-1, keepdim=True, dtype=torch.int32)
        stop = length - (token.flip(-1).cumsum(-1) == 0).sum(-1, keepdim=True, dtype=torch.int32)
        pos = _arange(length, attention_mask.device)
        inside = (pos >= start) & (pos < stop)
        if attention_mask.is_cpu and _has_values(attention_mask):
            odd = (attention_mask != inside).any(-1)
            if odd.any():
                raise ValueError(
                    f"IntervalMask.from_padding: batch entry {int(odd.int().argmax())} of attention_mask is not one "
                    "run of ones between zeros; from_dense takes padding between tokens, from_position_ids packed rows"
                )
        return _intervals(length, length, context=(start, pos + 1), rows=inside, batch=batch)

    @staticmethod
    def from_position_ids(position_ids: Tensor) -> IntervalMask:
        """Packed documents, each causal, which are told apart by the positions of their tokens.

        position_ids: int32 or int64 ``[B, L]``. A document starts at each position that is not its predecessor plus
        one, as in transformers. Padding cannot be recognised by its positions. It counts as documents of its own, which
        no token of another document sees.

        >>> mask = IntervalMask.from_position_ids(torch.tensor([[0, 1, 0, 1, 2]]))
        >>> mask.ctx_lo.tolist(), mask.ctx_hi.tolist()
        ([[0, 0, 2, 2, 2]], [[1, 2, 3, 4, 5]])
        """
        if position_ids.dim() != 2 or position_ids.dtype not in _INTEGERS:
            raise ValueError(
                f"IntervalMask.from_position_ids: position_ids is {shown(position_ids)}; "
                "int32 or int64 [B, L] is needed"
            )
        batch, length = position_ids.shape
        pos = _arange(length, position_ids.device)
        starts = position_ids.diff(prepend=position_ids[:, :1]) != 1
        start = torch.where(starts, pos, 0).cummax(-1).values
        return _intervals(length, length, context=(start, pos + 1), batch=batch)

    # ---- training drafters -------------------------------------------------------------------------------

    @staticmethod
    def anchor_blocks(
        context_len: int,
        anchors: Tensor,
        block_size: int,
        *,
        keep: Tensor | None = None,
        context_start: Tensor | None = None,
        window: int | None = None,
        convention: str = "specforge",
        causal: bool | None = None,
        include_context: bool = False,
    ) -> IntervalMask:
        """DFlash training (arXiv 2602.06036): one block per anchor, each over the context before its anchor.

        The keys are ``[context (context_len) | N blocks of block_size]``. The queries are the N * block_size slots.
        With include_context, the context's own causal rows come before them (for a LoRA drafter, where the target
        itself drafts). Slot 0 of a block is at the position of its anchor, and slot j at anchor + j. A block sees the
        context strictly before its anchor, and its own slots in both directions. It never sees another block.

        anchors: int32 or int64 ``[B, N]``, positions in the context, in any order. On the CPU another position is an
            error, unless its anchor is not kept. On a GPU, where this check would have to wait for the device, nothing
            is checked.
        keep: bool ``[B, N]``. The rows of an anchor that is not kept are empty.
        context_start: where a document begins in packed rows, int32 or int64. Without include_context ``[B, N]``, the
            beginning of each anchor's document. With include_context ``[B, context_len]``, the beginning of each
            token's document.
        window: the window of sliding layers, under one of three conventions, each as in the code of that name.
            "specforge": a slot sees the context with ``q_pos - k_pos < window`` at its own position. The window acts on
            the context alone, so a slot sees all slots up to itself, however small the window is.
            "zlab": the same rule holds inside the block as well. A block that is not causal looks ahead as far as
            it looks back, ``k_pos - q_pos < window``. SpecForge's mask and z-lab's differ only if the window is
            smaller than the block.
            "speculators": all slots see the same ``window`` tokens before the anchor. In the block they see the slots
            up to themselves or, if it is not causal, all slots.
        causal: whether a slot sees only the slots up to itself. By default, sliding layers are causal under "zlab" and
            under "specforge" (where they must be). All other layers are bidirectional in the block.
        """
        context_len = _int("anchor_blocks", "context_len", context_len)
        block_size = _step("anchor_blocks", "block_size", block_size)
        if window is not None:
            window = _step("anchor_blocks", "window", window)
        _check_convention("anchor_blocks", convention, ("specforge", "zlab", "speculators"))
        if causal is None:
            causal = window is not None and convention != "speculators"
        if convention == "specforge" and window is not None and not causal:
            raise ValueError("IntervalMask.anchor_blocks: the sliding layers of 'specforge' are causal in the block")
        if anchors.dim() != 2 or anchors.dtype not in _INTEGERS:
            raise ValueError(
                f"IntervalMask.anchor_blocks: anchors is {shown(anchors)}; int32 or int64 [B, N] is needed"
            )
        check_operands("IntervalMask.anchor_blocks", anchors=anchors, keep=keep, context_start=context_start)
        batch, count = anchors.shape
        include_context = include_context and context_len > 0
        starts = context_len if include_context else count
        for name, given, kind, dtypes, width in (
            ("keep", keep, "bool", (torch.bool,), count),
            ("context_start", context_start, "int32 or int64", _INTEGERS, starts),
        ):
            if given is not None and (given.shape != (batch, width) or given.dtype not in dtypes):
                raise ValueError(
                    f"IntervalMask.anchor_blocks: {name} is {shown(given)}; {kind} {[batch, width]} is needed"
                )
        if anchors.is_cpu and _has_values(anchors):
            outside = (anchors < 0) | (anchors >= context_len)
            if keep is not None:
                outside &= keep
            if outside.any():
                raise ValueError(
                    f"IntervalMask.anchor_blocks: an anchor is {int(anchors[outside][0])}; "
                    f"positions in the context, [0, {context_len}), are needed"
                )
        anchors = anchors.to(torch.int32)
        if context_start is None:
            context_start = anchors.new_zeros(batch, starts)
        token_start = context_start.to(torch.int32)
        anchor_start = token_start
        if include_context:
            # An anchor that is not kept may be anywhere.
            anchor_start = token_start.gather(1, anchors.long().clamp(0, context_len - 1))

        slot = _arange(count * block_size, anchors.device)
        off = slot % block_size
        own = context_len + slot - off
        anchor = anchors.repeat_interleave(block_size, dim=1)
        lo = anchor_start.repeat_interleave(block_size, dim=1)
        behind, first, last = block_window(off, block_size, causal, window, convention)
        if behind is not None:
            lo = torch.maximum(lo, anchor - behind)
        context, block = (lo, anchor.clamp(max=context_len)), (own + first, own + last)
        rows = None if keep is None else keep.repeat_interleave(block_size, dim=1)
        kv_len = context_len + count * block_size
        blocks = _intervals(kv_len, count * block_size, context, block, rows, batch=batch)
        if not include_context:
            return blocks
        pos = _arange(context_len, anchors.device)
        lo = token_start if window is None else torch.maximum(token_start, pos - (window - 1))
        causal = _intervals(kv_len, context_len, context=(lo, pos + 1))
        pairs = zip(causal._bounds(), blocks._bounds(), strict=True)
        return IntervalMask(*(torch.cat(pair, dim=1) for pair in pairs), kv_len)

    # ---- decoding ----------------------------------------------------------------------------------------

    @staticmethod
    def decode(
        cache_lens: Length,
        block_len: int,
        *,
        q_lens: Length | None = None,
        kv_start: Length = 0,
        causal: bool = False,
        window: int | None = None,
        convention: str | None = None,
        kv_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """A block of ``block_len`` rows against a cache, for drafting, verification (``causal=True``) and canvases.

        Row b of the key buffer holds the cached tokens at ``[kv_start, cache_lens)`` and the block itself at
        ``[cache_lens, cache_lens + q_lens)``. The index of a key in the buffer is its position. A row of the block sees
        the cached tokens and the whole block, or with causal the block up to itself. Rows from ``q_lens`` on are empty;
        by default there are none. A window hides keys before a row, but not those after it in its block. One operator
        computes all bounds, in one launch on a GPU. A replay of a captured CUDA graph reads lengths in tensors again.

        convention: how a window acts in drafting with sliding layers, "zlab" or "speculators", as in
            :meth:`anchor_blocks`. The block's anchor is at ``cache_lens``.
        kv_len: the capacity of the buffer. It is required when cache_lens is a tensor, and cache_lens + block_len
            otherwise. The caller makes sure that ``cache_lens + q_lens`` does not exceed it. Lengths in tensors are not
            checked, because that would wait for the device: keys from kv_len on are left out without an error.

        Raises ValueError for a length, window or convention out of range and for tensors that do not fit together, and
        TypeError for a length that is no integer.
        """
        if window is not None:
            # Lengths in tensors may be any int32, so that a window of _FAR could end within them.
            window = min(_int("decode", "window", window, least=1, most=None), 4 * _FAR)
        if convention is not None:
            _check_convention("decode", convention, _DECODE_CONVENTIONS[1:])
        block_len = _int("decode", "block_len", block_len)
        is_tensor = isinstance(cache_lens, Tensor)
        if not is_tensor:
            cache_lens = _int("decode", "cache_lens", cache_lens)
            if kv_len is None:
                kv_len = cache_lens + block_len
            elif q_lens is None and kv_len < cache_lens + block_len:
                raise ValueError(
                    f"IntervalMask.decode: {cache_lens} cached tokens and a block of {block_len} exceed kv_len {kv_len}"
                )
        kv_len = _int("decode", "kv_len", kv_len)
        device = _device("decode", device, cache_lens=cache_lens, q_lens=q_lens, kv_start=kv_start)
        if not is_tensor:
            cache_lens = torch.full((1,), cache_lens, dtype=torch.int64, device=device)
        q_lens, q_len = _tensor_or_int("decode", "q_lens", block_len if q_lens is None else q_lens)
        kv_starts, kv_start = _tensor_or_int("decode", "kv_start", kv_start)
        bounds = _decode_mask(
            cache_lens,
            q_lens,
            kv_starts,
            q_len,
            kv_start,
            block_len,
            kv_len,
            causal,
            window,
            _DECODE_CONVENTIONS.index(convention),
        )
        return _from_leaves(bounds.unbind(), (kv_len, None))

    @staticmethod
    def verify_and_draft(
        cache_lens: Length,
        rows: int,
        group: int,
        *,
        groups: int | None = None,
        q_lens: Length | None = None,
        causal: bool = False,
        window: int | None = None,
        kv_len: int | None = None,
        device: Device = None,
    ) -> IntervalMask:
        """One forward that verifies a draft and makes the next one (a gated LoRA drafter, arXiv 2507.11851).

        ``rows`` rows verify: the anchor and the drafted tokens, causal behind the cache. Behind each of them, where the
        draft may end, stands a group of ``group`` mask rows. It sees the context up to and with its row, and itself.
        In the key buffer of batch entry b the cached tokens are at ``[0, cache_lens)``, the rows that verify behind
        them, and then the groups one after the other: row j of the group of row i at ``cache_lens + rows + i * group +
        j``. There are ``rows + groups * group`` query rows, in the same order.

        The position of row j of group i is ``cache_lens + i + 1 + j``. A window acts at these positions, as in the
        convention "zlab" of :meth:`anchor_blocks`: a group that is not causal looks ahead as far as it looks back.

        groups: how many of the rows that verify have a group, from the first on. By default all have one.
        q_lens: how many of the rows that verify exist, ``rows`` by default. The others and their groups are empty.
        causal: a mask row sees the rows of its group up to itself. By default it sees all of them.
        kv_len: the capacity of the buffer, as in :meth:`decode`.

        >>> mask = IntervalMask.verify_and_draft(1, rows=2, group=1)
        >>> mask.to_bool().int()[0, 0].tolist()  # keys: one cached, two verified, the groups of one row
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]
        """
        where = "verify_and_draft"
        rows, group = (_int(where, name, value, least=1) for name, value in (("rows", rows), ("group", group)))
        groups = rows if groups is None else _int(where, "groups", groups, least=1, most=rows)
        window = None if window is None else _step(where, "window", window)
        count = rows + groups * group
        if not isinstance(cache_lens, Tensor):
            needed = _int(where, "cache_lens", cache_lens) + count
            kv_len = needed if kv_len is None else kv_len
            if kv_len < needed:
                raise ValueError(
                    f"IntervalMask.{where}: {cache_lens} cached tokens and {count} rows exceed kv_len {kv_len}"
                )
        kv_len = _int(where, "kv_len", kv_len)
        device = _device(where, device, cache_lens=cache_lens, q_lens=q_lens)
        cached = _column(cache_lens, device, where, "cache_lens")
        exist = _column(rows if q_lens is None else q_lens, cached.device, where, "q_lens")

        offsets = _draft_offsets(rows, group, groups, causal, window, cached)
        bounds = (cached + offsets[:4, None]).clamp(0, kv_len)
        bounds = torch.where(offsets[4] < exist, bounds, 0)
        return _from_leaves(bounds.unbind(), (kv_len, None))

    # ---- other forms -------------------------------------------------------------------------------------

    @staticmethod
    def from_dense(mask: Tensor) -> IntervalMask:
        """The intervals of a dense mask that was made elsewhere. The checks wait for the device.

        mask: bool (True: visible), or additive (0: visible, -1e4 or less: hidden), ``[B, 1, Lq, Lk]``,
        ``[B, Lq, Lk]`` or ``[Lq, Lk]``.
        Raises ValueError for a row that sees more than two runs of keys, for a mask that differs by head, and for an
        additive value between -1e4 and 0 or above 0.
        """
        visible = mask
        if mask.dtype != torch.bool:
            visible = mask == 0
            odd = ~visible & ~(mask <= -1e4)
            if odd.any():
                value = mask[odd][0].item()
                raise ValueError(f"IntervalMask.from_dense: {value:g} in the mask; bools, or 0 and <= -1e4, are needed")
        if visible.dim() == 4 and visible.shape[1] == 1:
            visible = visible[:, 0]
        elif visible.dim() == 2:
            visible = visible[None]
        elif visible.dim() != 3:
            raise ValueError(
                f"IntervalMask.from_dense: mask is {list(mask.shape)}; "
                "[B, 1, Lq, Lk], [B, Lq, Lk] and [Lq, Lk] are supported"
            )
        batch, q_len, kv_len = visible.shape
        # The columns at which the keys of a row become visible or hidden are, in order, the bounds of its intervals.
        padded = torch.nn.functional.pad(visible, (1, 1))
        turns = padded[..., 1:] != padded[..., :-1]
        row, column = turns.reshape(batch * q_len, kv_len + 1).nonzero(as_tuple=True)
        edges = torch.bincount(row, minlength=batch * q_len)
        if (edges > 4).any():
            b, i = divmod(int((edges > 4).nonzero()[0]), q_len)
            raise ValueError(
                f"IntervalMask.from_dense: row {i} of batch entry {b} sees {int(edges[b * q_len + i]) // 2} "
                "separate runs of keys; at most 2 are supported"
            )
        nth = torch.arange(row.numel(), device=row.device) - (edges.cumsum(0) - edges)[row]
        bounds = torch.zeros(4, batch * q_len, dtype=torch.int32, device=visible.device)
        bounds[nth, row] = column.int()
        return IntervalMask(*bounds.view(4, batch, q_len), kv_len)

    def to_bool(self) -> Tensor:
        """bool ``[B, 1, Lq, Lk]``, True where the key is visible (PyTorch SDPA's convention)."""
        key = torch.arange(self.kv_len, device=self.device, dtype=torch.int32)
        return self._sees(*(bound[:, None, :, None] for bound in self._bounds()), key)

    def to_dense(self, dtype: torch.dtype) -> Tensor:
        """Additive ``[B, 1, Lq, Lk]``: 0 for visible keys, the lowest finite number of ``dtype`` for others.

        transformers models take masks of this form. ``dtype`` must be the model's, because the lowest float32 overflows
        to -inf in half precision. A row that sees no key attends to all keys equally under such a mask, because a
        softmax over equal scores is uniform. ``block_attn`` gives 0 for such a row.
        """
        visible = self.to_bool()
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(visible, torch.zeros((), dtype=dtype, device=self.device), hidden)

    def to_flex(self):
        """The same mask as a FlexAttention BlockMask, for this mask's batch size and any number of heads."""
        from torch.nn.attention.flex_attention import create_block_mask

        single = self.batch == 1
        bounds = [bound[0] for bound in self._bounds()] if single else self._bounds()

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self._sees(*(bound[q] if single else bound[b, q] for bound in bounds), k)

        batch = None if single else self.batch
        return create_block_mask(mask_mod, batch, None, self.q_len, self.kv_len, device=self.device)

    @staticmethod
    def _sees(ctx_lo: Tensor, ctx_hi: Tensor, blk_lo: Tensor, blk_hi: Tensor, key: Tensor) -> Tensor:
        return ((key >= ctx_lo) & (key < ctx_hi)) | ((key >= blk_lo) & (key < blk_hi))


def block_window(
    slot: Tensor, block_size: int, causal: bool, window: int | None, convention: str | None
) -> tuple[Tensor | int | None, Tensor, Tensor]:
    """What a slot of a block sees: the number of tokens before the block (None for all), and the slots [first, last).

    convention: one of `anchor_blocks`, or None for a window that hides only keys before a slot.
    """
    first = torch.zeros_like(slot)
    last = slot + 1 if causal else torch.full_like(slot, block_size)
    if window is None:
        return None, first, last
    if convention == "speculators":
        return window, first, last
    if convention != "specforge":
        first = (slot - (window - 1)).clamp(min=0)
    if convention == "zlab":
        last = last.minimum(slot + window)
    return window - 1 - slot, first, last


def _draft_offsets(rows: int, group: int, groups: int, causal: bool, window: int | None, cached: Tensor) -> Tensor:
    """int32 [5, rows + groups * group]: the bounds of `verify_and_draft` less the cached length, and the row that each
    query verifies or stands behind. They are kept for later calls."""
    key = rows, group, groups, causal, window, cached.device
    if key in _KNOWN_OFFSETS and _has_values(cached):
        return _KNOWN_OFFSETS[key]
    query = _arange(rows + groups * group, cached.device)
    member = query - rows
    drafts = member >= 0
    slot = torch.where(drafts, member % group, -1)  # in the group; a row that verifies stands before the first
    row = torch.where(drafts, member // group, query)
    own = rows + member - slot
    behind, first, last = block_window(slot, group, causal, window, "zlab")
    low = torch.full_like(row, -_FAR) if behind is None else row + 1 - behind
    # A row that verifies sees the cache as context, and the rows up to itself as its block, as in `decode`.
    context = low, torch.where(drafts, row + 1, 0)
    block = torch.where(drafts, own + first, low.clamp(min=0)), torch.where(drafts, own + last, row + 1)
    offsets = torch.cat([*context, *block, row])
    is_captured = offsets.is_cuda and torch.cuda.is_current_stream_capturing()  # whose memory is the graph's own
    if _has_values(cached) and not is_captured:
        _KNOWN_OFFSETS[key] = offsets
    return offsets


def _check_convention(where: str, convention: str, supported: tuple[str, ...]) -> None:
    if convention not in supported:
        names = ", ".join(map(repr, supported[:-1])) + f" and {supported[-1]!r}"
        raise ValueError(f"IntervalMask.{where}: convention is {convention!r}; {names} are supported")


def _device(where: str, device: Device, **lengths: Length | None) -> Device:
    """The device of the lengths that are tensors, or ``device`` if none is.

    Raises ValueError unless the tensors are int32 or int64 ``[B]``, on one device and for one batch. A tensor of one
    entry serves the whole batch.
    """
    given = {name: x for name, x in lengths.items() if isinstance(x, Tensor)}
    for name, x in given.items():
        if x.dim() != 1 or x.dtype not in _INTEGERS:
            raise ValueError(f"IntervalMask.{where}: {name} is {shown(x)}; an int, or int32 or int64 [B], is needed")
    check_operands(f"IntervalMask.{where}", **given)
    batches = {name: x for name, x in given.items() if x.shape[0] != 1}
    for name, x in batches.items():
        first, other = next(iter(batches.items()))
        if x.shape != other.shape:
            raise ValueError(f"IntervalMask.{where}: {first} is {shown(other)}, {name} {shown(x)}; one batch is needed")
    return next(iter(given.values())).device if given else device


def _arange(length: int, device: Device) -> Tensor:
    """int32 [1, length]: the positions of a row."""
    return torch.arange(length, dtype=torch.int32, device=device)[None]


def check_head_dim(where: str, head_dim: int) -> None:
    """Raises ValueError for a head_dim that the attention kernels do not support."""
    if head_dim % 8 or not 8 <= head_dim <= 512:
        raise ValueError(f"{where}: head_dim is {head_dim}; multiples of 8 up to 512 are supported")


def _has_values(x: Tensor) -> bool:
    """Whether a tensor has values that can be read. Fake tensors have none, nor have those of a traced function."""
    return type(x) is Tensor and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


def _int(where: str, name: str, value: int, least: int = 0, most: int | None = _LARGEST) -> int:
    """Checks an integer of any type and returns it as an int. A SymInt stays one, so that a trace fixes no value."""
    if not is_int(value):
        raise TypeError(f"IntervalMask.{where}: {name} is {shown(value)}; an int is needed")
    value = value if isinstance(value, int | torch.SymInt) else int(value)
    if value < least:
        raise ValueError(f"IntervalMask.{where}: {name} is {value}; at least {least} is needed")
    if most is not None and value > most:
        raise ValueError(f"IntervalMask.{where}: {name} is {value}; at most {most} is supported")
    return value


def _step(where: str, name: str, value: int) -> int:
    """A window or block size of at least 1. A size beyond any mask becomes a number that fits into int32."""
    return min(_int(where, name, value, least=1, most=None), _FAR)


def _column(length: Length, device: Device, where: str, name: str) -> Tensor:
    """A length as int32 [B, 1], without a copy from the host."""
    if isinstance(length, Tensor):
        return length.clamp(max=_FAR).to(torch.int32)[:, None]
    length = min(_int(where, name, length, most=None), _FAR)
    return torch.full((1, 1), length, dtype=torch.int32, device=device)


def _tensor_or_int(where: str, name: str, length: Length) -> tuple[Tensor | None, int]:
    """A length as two arguments of a native operator: a tensor or None, and the number to use without a tensor."""
    return (length, 0) if isinstance(length, Tensor) else (None, _int(where, name, length))


def _padded(
    lens: Length,
    padded: int | None,
    device: Device,
    where: str,
    name: str = "seq_len",
    padded_name: str = "max_len",
) -> tuple[Tensor, int]:
    """The true lengths [B, 1], and the static length to which they are padded. The latter defaults to an int length."""
    if padded is None and not isinstance(lens, Tensor):
        padded = lens
    return _column(lens, device, where, name), _int(where, padded_name, padded)


def _intervals(
    kv_len: int,
    q_len: int,
    context: tuple[int | Tensor, int | Tensor],
    block: tuple[int | Tensor, int | Tensor] = (0, 0),
    rows: Tensor | None = None,
    batch: int = 1,
) -> IntervalMask:
    """A mask of these bounds, broadcast to int32 [B, q_len] and clamped to [0, kv_len]. Where ``rows`` is False, a row
    is empty."""
    given = [*context, *block] + ([] if rows is None else [rows])
    tensors = [x for x in given if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes((batch, q_len), *(x.shape for x in tensors))
    bounds = []
    for bound in (*context, *block):
        if not isinstance(bound, Tensor):
            bound = torch.full((1, 1), bound, dtype=torch.int32, device=tensors[0].device)
        bound = bound.clamp(0, kv_len)
        if rows is not None:
            bound = torch.where(rows, bound, 0)
        bounds.append(bound.expand(shape).contiguous())
    return IntervalMask(*bounds, kv_len)


@torch.library.register_fake("dflash_ext::decode_mask")
def _(cache_lens, q_lens, kv_starts, q_len, kv_start, block_len, *others):
    given = (x.shape for x in (cache_lens, q_lens, kv_starts) if x is not None)
    return cache_lens.new_empty((4, *torch.broadcast_shapes(*given), block_len), dtype=torch.int32)


def _keyed_leaves(mask: IntervalMask) -> tuple[list[tuple[pytree.GetAttrKey, Tensor]], tuple]:
    """The tensors are leaves. kv_len and planned_for are structure, so that compile and export keep the numbers."""
    names = BOUNDS + (() if mask.tiles is None else ("tiles",))
    return [(pytree.GetAttrKey(name), getattr(mask, name)) for name in names], (mask.kv_len, mask.planned_for)


def _leaves(mask: IntervalMask) -> tuple[list[Tensor], tuple]:
    keyed, structure = _keyed_leaves(mask)
    return [leaf for _, leaf in keyed], structure


def _from_leaves(leaves: Iterable, structure: tuple) -> IntervalMask:
    """Makes a mask without checks, because a tree_map may put anything in the place of the tensors."""
    mask = object.__new__(IntervalMask)
    kv_len, planned_for = structure
    named = dict(zip((*BOUNDS, "tiles"), leaves, strict=False), kv_len=kv_len, planned_for=planned_for)
    for name, value in named.items():
        object.__setattr__(mask, name, value)  # not `__dict__.update`, which torch.compile cannot trace in torch 2.11
    return mask


def _as_tuples(structure: Any) -> Any:
    """torch.export.save writes the structure as JSON, which has lists only."""
    return tuple(map(_as_tuples, structure)) if isinstance(structure, list) else structure


pytree.register_pytree_node(
    IntervalMask,
    _leaves,
    _from_leaves,
    flatten_with_keys_fn=_keyed_leaves,
    serialized_type_name="dflash_ext.IntervalMask",
    to_dumpable_context=list,
    from_dumpable_context=_as_tuples,
)
# torch.load reads masks by default, with weights_only=True, once this package is imported.
torch.serialization.add_safe_globals([IntervalMask])


def _collate(masks: Sequence[IntervalMask], *, collate_fn_map: Any = None) -> IntervalMask:
    """What a DataLoader makes of the masks of its samples: one for the batch."""
    shapes = {(mask.q_len, mask.kv_len) for mask in masks}
    if len(shapes) > 1:
        raise ValueError(
            f"IntervalMask: masks of {sorted(shapes)} rows and keys do not make a batch; pad them to one size"
        )
    return IntervalMask(*map(torch.cat, zip(*(mask._bounds() for mask in masks), strict=True)), masks[0].kv_len)


default_collate_fn_map[IntervalMask] = _collate
