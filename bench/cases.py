"""The attention cases that the GPU benches share: masks, shapes, inputs, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_ext import IntervalMask, reference


@dataclass(frozen=True)
class Case:
    name: str
    mask: Callable[[], IntervalMask]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.name}, B{self.batch} h{self.heads}/{self.kv_heads} d{self.head_dim}"

    def inputs(self, mask: IntervalMask) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in bfloat16 on the GPU."""
        lengths = (self.heads, mask.q_len), (self.kv_heads, mask.kv_len), (self.kv_heads, mask.kv_len)
        shapes = [(self.batch, heads, length, self.head_dim) for heads, length in lengths]
        return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)

    def flops(self, pairs: int) -> float:
        """Of a forward over so many visible pairs a head."""
        return 4.0 * self.heads * self.head_dim * pairs


def anchors() -> IntervalMask:
    """DFlash training: 512 anchors in random places of 3072 tokens, in order, as its collator draws them."""
    torch.manual_seed(0)
    where = torch.randperm(3070)[:512].sort().values[None]
    return IntervalMask.anchor_blocks(3072, where.cuda(), 16)


PREFIX_1024 = "prefix 1024 + block 1024"
TRAINING_CASES = [
    Case(PREFIX_1024, lambda: IntervalMask.prefix_block(2048, 1024, device="cuda"), 4, 32, 8, 128),
    Case("prefix 4096 + block 4096", lambda: IntervalMask.prefix_block(8192, 4096, device="cuda"), 1, 32, 8, 128),
    Case("block-causal b16, S4096", lambda: IntervalMask.block_causal(4096, 16, device="cuda"), 2, 32, 8, 128),
    Case("512 anchors x 16, S3072", anchors, 1, 32, 8, 128),
    Case(PREFIX_1024, lambda: IntervalMask.prefix_block(2048, 1024, device="cuda"), 4, 8, 1, 256),
    Case("causal, S2048", lambda: IntervalMask.causal(2048, device="cuda"), 4, 8, 1, 256),
    Case("causal, S4096", lambda: IntervalMask.causal(4096, device="cuda"), 2, 32, 32, 64),
    Case("prefix 1024 + block 1024", lambda: IntervalMask.prefix_block(2048, 1024, device="cuda"), 4, 32, 8, 64),
    Case("causal, S2048", lambda: IntervalMask.causal(2048, device="cuda"), 2, 16, 2, 512),
]


def visible_pairs(mask: IntervalMask, batch: int) -> int:
    """Key and query pairs of a head, over the batch."""
    rows = range(0, mask.q_len, 1024)
    seen = sum(int(_rows(mask, slice(i, i + 1024)).to_bool().sum()) for i in rows)
    return seen * (batch if mask.batch == 1 else 1)


def exact_head(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
    """The first head of the first batch entry in float64, ``[Lq, D]``."""
    first = [x[:1, :1].double() for x in (q, k, v)]
    parts = []
    for i in range(0, mask.q_len, 1024):
        rows = slice(i, i + 1024)
        one = _rows(mask, rows)
        one = IntervalMask(one.ctx_lo[:1], one.ctx_hi[:1], one.blk_lo[:1], one.blk_hi[:1], mask.kv_len)
        parts.append(reference.block_attn(first[0][:, :, rows], *first[1:], one))
    return torch.cat(parts, dim=2)[0, 0]


def _rows(mask: IntervalMask, rows: slice) -> IntervalMask:
    bounds = (bound[:, rows] for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi))
    return IntervalMask(*bounds, mask.kv_len)


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square, relative to that of what is wanted."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()
