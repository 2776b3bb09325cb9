"""What serves each operator on each kind of device, as ``dflash-ext doctor`` and one warning say."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings

import torch

from ..native import load

NATIVE = "native kernel"
_REFERENCE = "plain PyTorch (reference)"
_FORWARD = f"{NATIVE} (bf16, fp16), else PyTorch SDPA with a dense mask or plain PyTorch"

SERVED_BY = {
    "block_attn": {"cpu": NATIVE, "cuda": _FORWARD},
    "block_attn_decode": {"cpu": NATIVE, "cuda": f"{NATIVE} (bf16, fp16), else {_REFERENCE}"},
    "masked_cross_entropy": {"cpu": NATIVE, "cuda": NATIVE},
    "linear_cross_entropy": {"cpu": f"PyTorch GEMM and {NATIVE}", "cuda": f"PyTorch GEMM and {NATIVE}"},
    "sharded_linear_cross_entropy": {"cpu": f"PyTorch GEMM and {NATIVE}", "cuda": f"PyTorch GEMM and {NATIVE}"},
    "sample": {"cpu": NATIVE, "cuda": f"{NATIVE}, float64 by {_REFERENCE}"},
    "verify": {"cpu": NATIVE, "cuda": f"{NATIVE}, float64 by {_REFERENCE}"},
    "count_tokens_": {"cpu": "PyTorch", "cuda": "PyTorch"},
    "reveal": {"cpu": NATIVE, "cuda": NATIVE},
    "soft_embedding": {"cpu": "PyTorch", "cuda": f"PyTorch GEMM and {NATIVE}, float64 by PyTorch"},
    "sample_and_embed": {"cpu": f"PyTorch and {NATIVE}", "cuda": f"PyTorch GEMM and {NATIVE}, float64 by PyTorch"},
    "linear": {"cpu": NATIVE, "cuda": f"{NATIVE} (bf16, fp16, on Hopper), else PyTorch's operators"},
    "kv_inject": {"cpu": f"PyTorch GEMM and {NATIVE}", "cuda": f"PyTorch GEMM and {NATIVE}"},
}


_LAYOUT = "an address or stride that is not a multiple of 16 bytes, or a stride of 0"

# The calls that a portable kernel serves on a Hopper GPU, although the operator has a Hopper kernel: the operator, and
# the reason. They are in the order of the bits of csrc/common/served.h.
PORTABLE = (
    ("block_attn", _LAYOUT),
    ("block_attn_decode", _LAYOUT),
    ("block_attn_decode", "a head_dim above 256 and less than 64 rows, or exact=True"),
    ("block_attn_decode", "more than 64 query heads for a key head"),
    ("block_attn_decode", "pages whose size is no multiple of 16"),
    ("linear_cross_entropy", "a vocabulary whose rows of logits are no multiples of 16 bytes"),
    ("linear_cross_entropy", "a vocabulary whose rows of logits are longer than 880 KiB"),
    ("block_attn", f"gradients, with {_LAYOUT}"),
    ("block_attn", "gradients with deterministic=True above 262,144 keys"),
)


def warn_once(op: str, device: torch.device) -> None:
    """Warns at the first call of an operator on a GPU that no kernel of this package serves it."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn(op)


@functools.cache
def _warn(op: str) -> None:
    warnings.warn(f"dflash_ext.{op} on cuda is served by {SERVED_BY[op]['cuda']}", stacklevel=4)


@functools.cache
def hopper_kernels_serve(device: torch.device) -> bool:
    """Whether kernels for Hopper run on the GPU: not on any other, nor if DFLASH_EXT_GPU asks for portable ones."""
    return torch.cuda.get_device_capability(device)[0] == 9 and os.environ.get("DFLASH_EXT_GPU") != "portable"


_told = 0  # the bits of PORTABLE of which a warning was given


def warn_of_portable_kernels(device: torch.device) -> None:
    """Called after a call on a GPU. Warns once for each operator and reason that a slower kernel served a call."""
    global _told
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    new = portable_reasons().value & ~_told
    if not new:
        return
    _told |= new
    for bit, (op, reason) in enumerate(PORTABLE):
        if new >> bit & 1:
            warnings.warn(
                f"dflash_ext.{op}: {reason}: the portable kernel serves such calls, more slowly than the Hopper kernel",
                stacklevel=3,
            )


@functools.cache
def portable_reasons() -> ctypes.c_uint32:
    """The native library's own record: the bits of PORTABLE that have occurred in this process."""
    return ctypes.c_uint32.in_dll(ctypes.CDLL(str(load())), "dflash_ext_portable_reasons")
