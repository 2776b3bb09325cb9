"""FlashAttention-4 through its own interface: a mask function in CuTe and the lists of blocks that the mask shows.

Importing this module needs the package flash-attn-4.
"""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import flash_attn_func
from flash_attn.cute.utils import scalar_to_ssa, ssa_to_scalar
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from bench.cases import Pattern


def block_sizes(head_dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and keys of a block in the lists of the forward and of the backward. The kernels take no other lists."""
    return ((128, 80), (128, 64)) if head_dim > 192 else ((128, 128), (128, 128))


def prefix_block(prefix: int) -> Callable:
    @cute.jit
    def mask_mod(b, h, q, k, seqlen_info, aux_tensors):
        return (k <= q) | (q >= scalar_to_ssa(prefix, cutlass.Int32))

    return mask_mod


def block_causal(block: int) -> Callable:
    @cute.jit
    def mask_mod(b, h, q, k, seqlen_info, aux_tensors):
        return (k // block) <= (q // block)

    return mask_mod


def anchor_blocks(context: int, block: int, _anchors: Tensor) -> Callable:
    @cute.jit
    def mask_mod(b, h, q, k, seqlen_info, aux_tensors):
        end = scalar_to_ssa(context, cutlass.Int32)
        mine = q // block
        anchor = scalar_to_ssa(aux_tensors[0][ssa_to_scalar(mine)], cutlass.Int32)
        own = (k >= end) & (((k - end) // block) == mine)
        return ((k < end) & (k < anchor)) | own

    return mask_mod


def attention(pattern: Pattern, head_dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of q, k, v ``[B, heads, L, D]`` that FlashAttention-4's users would write for this pattern."""
    if pattern.is_causal:
        options = {"causal": True}
    else:
        sizes, lengths = block_sizes(head_dim), (pattern.mask.q_len, pattern.mask.kv_len)
        forward, backward = (
            create_block_mask(pattern.mask_mod, None, None, *lengths, device="cuda", BLOCK_SIZE=size) for size in sizes
        )
        of_rows = forward.kv_num_blocks, forward.kv_indices, forward.full_kv_num_blocks, forward.full_kv_indices
        of_keys = backward.q_num_blocks, backward.q_indices, backward.full_q_num_blocks, backward.full_q_indices
        options = {
            "mask_mod": globals()[pattern.flash](*pattern.arguments),
            "aux_tensors": [x for x in pattern.arguments if isinstance(x, Tensor)] or None,
            "block_sparse_tensors": BlockSparseTensorsTorch(*of_rows, block_size=sizes[0]),
            "block_sparse_tensors_bwd": BlockSparseTensorsTorch(*of_keys, block_size=sizes[1]),
        }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend
