"""What serves each operator on each kind of device, as ``dflash-ext doctor`` and one warning say."""

from __future__ import annotations

import functools
import warnings

import torch

NATIVE = "native kernel"
_REFERENCE = "plain PyTorch (reference)"
_FORWARD = f"{NATIVE} (bf16, fp16), else PyTorch SDPA with a dense mask or plain PyTorch"

SERVED_BY = {
    "block_attn": {"cpu": NATIVE, "cuda": _FORWARD},
    "block_attn_decode": {"cpu": NATIVE, "cuda": f"{NATIVE} (bf16, fp16), else {_REFERENCE}"},
    "masked_cross_entropy": {"cpu": NATIVE, "cuda": NATIVE},
    "linear_cross_entropy": {"cpu": f"PyTorch GEMM and {NATIVE}", "cuda": f"PyTorch GEMM and {NATIVE}"},
    "sample": {"cpu": NATIVE, "cuda": _REFERENCE},
    "verify": {"cpu": NATIVE, "cuda": _REFERENCE},
    "reveal": {"cpu": NATIVE, "cuda": _REFERENCE},
    "kv_inject": {"cpu": f"PyTorch GEMM and {NATIVE}", "cuda": _REFERENCE},
}


def warn_once(op: str, device: torch.device) -> None:
    """Says, at the first call of an operator on a GPU, that no kernel of this package serves it."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _warn(op)


@functools.cache
def _warn(op: str) -> None:
    warnings.warn(f"dflash_ext.{op} on cuda is served by {SERVED_BY[op]['cuda']}", stacklevel=4)
