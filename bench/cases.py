"""The attention cases that the GPU benches share: masks, shapes, inputs, exact results, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_ext import IntervalMask, reference

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"  # the passes of a results row


class Pattern(NamedTuple):
    """A mask in the forms of this package and of its peers.

    mask: this package's.
    mask_mod: FlexAttention's function of (batch, head, query, key).
    flash: the name of the function in ``bench.flash_attention_4`` that makes FlashAttention-4's form.
    arguments: the arguments of that function: ints, or tensors on which the mask depends.
    """

    mask: IntervalMask
    mask_mod: Callable[..., Tensor]
    flash: str
    arguments: tuple = ()

    @property
    def is_causal(self) -> bool:
        return self.flash == "causal"


def causal(length: int) -> Pattern:
    return Pattern(IntervalMask.causal(length, device="cuda"), lambda b, h, q, k: k <= q, "causal")


def prefix_block(length: int, prefix: int) -> Pattern:
    mask = IntervalMask.prefix_block(length, prefix, device="cuda")
    return Pattern(mask, lambda b, h, q, k: (k <= q) | (q >= prefix), "prefix_block", (prefix,))


def block_causal(length: int, block: int) -> Pattern:
    mask = IntervalMask.block_causal(length, block, device="cuda")
    return Pattern(mask, lambda b, h, q, k: k // block <= q // block, "block_causal", (block,))


def anchor_blocks(context: int, count: int, block: int) -> Pattern:
    """DFlash's training mask: anchors in random places of the context, in order, as the collator draws them."""
    torch.manual_seed(0)
    anchors = torch.randperm(context - 2)[:count].sort().values.int().cuda()

    def mask_mod(b, h, q, k):
        own = (k >= context) & ((k - context) // block == q // block)
        return ((k < context) & (k < anchors[q // block])) | own

    mask = IntervalMask.anchor_blocks(context, anchors[None], block)
    return Pattern(mask, mask_mod, "anchor_blocks", (context, block, anchors))


@dataclass(frozen=True)
class Case:
    """heads, kv_heads: query and key heads. head_dim: their width."""

    name: str
    pattern: Callable[[], Pattern]
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
        """The floating-point operations of a forward in which each head has this number of visible pairs."""
        return 4.0 * self.heads * self.head_dim * pairs


PREFIX_1024 = "prefix 1024 + block 1024"
prefix_1024 = partial(prefix_block, 2048, 1024)
ANCHORS = Case("512 anchors x 16, S3072", partial(anchor_blocks, 3072, 512, 16), 1, 32, 8, 128)
TRAINING_CASES = [
    Case(PREFIX_1024, prefix_1024, 4, 32, 8, 128),
    Case("prefix 4096 + block 4096", partial(prefix_block, 8192, 4096), 1, 32, 8, 128),
    Case("block-causal b16, S4096", partial(block_causal, 4096, 16), 2, 32, 8, 128),
    ANCHORS,
    Case(PREFIX_1024, prefix_1024, 4, 8, 1, 256),
    Case("causal, S2048", partial(causal, 2048), 4, 8, 1, 256),
    Case("causal, S4096", partial(causal, 4096), 2, 32, 32, 64),
    Case(PREFIX_1024, prefix_1024, 4, 32, 8, 64),
    Case("causal, S2048", partial(causal, 2048), 2, 16, 2, 512),
]


def visible_pairs(mask: IntervalMask, batch: int) -> int:
    """The number of pairs of a query and a key that it sees, in one head, for a batch whose entries share the mask."""
    rows = range(0, mask.q_len, 1024)
    return batch * sum(int(_rows(mask, slice(i, i + 1024)).to_bool().sum()) for i in rows)


class Exact(NamedTuple):
    """Exact results (float64): the first head's output and query gradient, and the gradients of its key head."""

    out: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor

    def errors(self, out: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
        """The error of an output, and the largest of the errors of its gradients."""
        pairs = zip(grads, self[1:], strict=True)
        return error(out[0, 0], self.out), max(error(got[0, 0], want) for got, want in pairs)


def exact(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, mask: IntervalMask) -> Exact:
    """The exact results of the first key head and its group of query heads, in chunks of rows."""
    group = q.shape[1] // k.shape[1]
    q, upstream = (x[:1, :group].detach().double() for x in (q, upstream))
    k, v = (x[:1, :1].detach().double().requires_grad_() for x in (k, v))
    outs, grads_q, grads_k, grads_v = [], [], 0, 0
    for i in range(0, mask.q_len, 1024):
        rows = slice(i, i + 1024)
        part = q[:, :, rows].requires_grad_()
        out = reference.block_attn(part, k, v, _rows(mask, rows))
        grad_q, grad_k, grad_v = torch.autograd.grad(out, (part, k, v), upstream[:, :, rows])
        outs.append(out.detach()[0, 0])
        grads_q.append(grad_q[0, 0])
        grads_k, grads_v = grads_k + grad_k[0, 0], grads_v + grad_v[0, 0]
    return Exact(torch.cat(outs), torch.cat(grads_q), grads_k, grads_v)


def exact_head(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> Tensor:
    """The output of the first head of the first batch entry in float64, ``[Lq, D]``."""
    first = [x[:1, :1].double() for x in (q, k, v)]
    return reference.block_attn(*first, _rows(mask, slice(None)))[0, 0]


def _rows(mask: IntervalMask, rows: slice) -> IntervalMask:
    """The mask of some rows of the first batch entry."""
    bounds = (bound[:1, rows] for bound in (mask.ctx_lo, mask.ctx_hi, mask.blk_lo, mask.blk_hi))
    return IntervalMask(*bounds, mask.kv_len)


def error(got: Tensor, want: Tensor) -> float:
    """The root mean square of the difference, divided by that of the exact result."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()
