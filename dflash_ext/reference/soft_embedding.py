"""Expected embeddings in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import per_row, softcapped, without_nan


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float | Tensor = 1.0, softcap: float | None = None
) -> Tensor:
    """``softmax(softcap(logits) / temperature) @ embedding``; see ``dflash_ext.soft_embedding`` for the rules."""
    real = torch.promote_types(torch.promote_types(logits.dtype, embedding.dtype), torch.float32)
    z = logits.to(real).clamp(max=torch.finfo(real).max)
    z = without_nan(softcapped(z, softcap if softcap is not None and softcap > 0 else None))
    z = z / per_row(temperature, z).clamp(1e-30, 1e30).to(real)
    return (torch.softmax(z.clamp(max=torch.finfo(real).max), dim=-1) @ embedding.to(real)).to(embedding.dtype)
