"""Expected embeddings of a distribution over the vocabulary, for self-conditioning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_tensors, shown
from ..native import load
from ..reference.numerics import softcapped
from .backends import warn_once
from .logits import LOGITS_DTYPES, by_row, cap_of, check_last_dim, number_and_tensor

load()
_native = torch.ops.dflash_ext

# Weights that exist at a time. Fewer and larger products outweigh that the weights leave the L2 cache
# (csrc/sample/TUNING.md).
_WEIGHTS_AT_A_TIME = 64 << 20
_LEAST_CHUNK, _CHUNK_MULTIPLE = 4096, 64


def soft_embedding(
    logits: Tensor, embedding: Tensor, *, temperature: float | Tensor = 1.0, softcap: float | None = None
) -> Tensor:
    """``softmax(softcap(logits) / temperature) @ embedding``, a chunk of the vocabulary at a time; no gradient.

    Uniform-state diffusion conditions a step on the expected embedding of the step before (DiffusionGemma). The
    probabilities never exist as a whole: a kernel turns a chunk of logits into exponentials, which are multiplied by
    the chunk's embeddings and summed in float32; the result is normalised at the end.

    Args:
        logits: ``[..., V]`` float32, bfloat16 or float16, the last dimension contiguous. NaN counts as -inf, and +inf
            as the largest number.
        embedding: ``[V, H]`` float32, bfloat16 or float16. Exponentials are rounded to its dtype.
        temperature: a number > 0, or a tensor ``[]`` or ``[...]``. What is outside of 1e-30 to 1e30 counts as the
            nearest of these.
        softcap: ``softcap * tanh(logits / softcap)`` comes before the temperature; None or 0 for none.

    Returns:
        ``[..., H]`` of the embedding's dtype. A row of nothing but -inf and NaN is NaN.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type.
    """
    check_tensors("soft_embedding", logits=logits, embedding=embedding, numbers={"temperature": temperature})
    if logits.dim() == 0 or logits.dtype not in LOGITS_DTYPES or logits.shape[-1] == 0:
        raise ValueError(f"soft_embedding: logits is {shown(logits)}; floating [..., V], V > 0, is needed")
    vocab, shape = logits.shape[-1], logits.shape[:-1]
    if embedding.dim() != 2 or len(embedding) != vocab or embedding.dtype not in LOGITS_DTYPES:
        raise ValueError(f"soft_embedding: embedding is {shown(embedding)}; floating [{vocab}, H] is needed")
    check_last_dim("soft_embedding", "logits", logits)
    if not isinstance(temperature, Tensor) and (temperature is None or not temperature > 0):
        raise ValueError(f"soft_embedding: temperature is {temperature}; a number above 0 is needed")
    temperature = by_row("soft_embedding", shape, temperature=temperature)["temperature"]
    softcap = cap_of("soft_embedding", softcap)
    logits, embedding = logits.detach().reshape(shape.numel(), vocab), embedding.detach()
    is_double = torch.float64 in (logits.dtype, embedding.dtype)
    if logits.is_cuda and not is_double:
        embedded = _on_gpu(logits, embedding, temperature, softcap)
    else:
        if logits.is_cuda:
            warn_once("soft_embedding", logits.device)
        embedded = _in_pytorch(logits, embedding, temperature, softcap)
    return embedded.to(embedding.dtype).view(*shape, embedding.shape[1])


def _chunks(rows: int, vocab: int) -> list[tuple[int, int]]:
    size = max(_LEAST_CHUNK, _WEIGHTS_AT_A_TIME // max(rows, 1) // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)
    return [(begin, min(begin + size, vocab)) for begin in range(0, vocab, size)]


def _on_gpu(logits: Tensor, embedding: Tensor, temperature: float | Tensor, softcap: float) -> Tensor:
    number, by_row = number_and_tensor(temperature, 1.0, torch.float32)
    rows = len(logits)
    embedded = logits.new_empty(rows, embedding.shape[1], dtype=torch.float32)  # so far
    origins, sums = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    in_float32 = {} if embedding.dtype == torch.float32 else {"out_dtype": torch.float32}
    for begin, end in _chunks(rows, logits.shape[1]):
        weights = logits.new_empty(rows, end - begin, dtype=embedding.dtype)
        _native.scaled_exp_(logits, begin, by_row, number, softcap, weights, origins, sums, embedded)
        product = weights, embedding[begin:end]
        embedded = torch.addmm(embedded, *product, **in_float32) if begin > 0 else torch.mm(*product, **in_float32)
    return torch.div(embedded, sums[:, None], out=logits.new_empty(embedded.shape, dtype=embedding.dtype))


def _in_pytorch(logits: Tensor, embedding: Tensor, temperature: float | Tensor, softcap: float) -> Tensor:
    """The same sums; two passes over the logits, the first of which finds the normaliser."""
    real = torch.promote_types(torch.promote_types(logits.dtype, embedding.dtype), torch.float32)
    chunks = _chunks(len(logits), logits.shape[1])
    if isinstance(temperature, Tensor):
        temperature = temperature.to(real)[:, None]
    temperature = torch.as_tensor(temperature, dtype=real, device=logits.device).clamp(1e-30, 1e30)
    largest = torch.finfo(real).max

    def scores(begin: int, end: int) -> Tensor:
        z = logits[:, begin:end].to(real)
        z = z.masked_fill(z.isnan(), -math.inf).clamp(max=largest)
        z = softcapped(z, softcap)
        return (z / temperature).clamp(max=largest)

    parts = [(z.amax(-1), z.logsumexp(-1)) for z in (scores(*chunk) for chunk in chunks)]
    origin, normaliser = (torch.stack(part) for part in zip(*parts, strict=True))
    origin, normaliser = origin.amax(0)[:, None], normaliser.logsumexp(0)[:, None]
    embedded = logits.new_zeros(len(logits), embedding.shape[1], dtype=real)
    for begin, end in chunks:
        weights = (scores(begin, end) - origin).exp().to(embedding.dtype)
        embedded += weights.to(real) @ embedding[begin:end].to(real)
    return embedded / (normaliser - origin).exp()


@torch.library.register_fake("dflash_ext::scaled_exp_")
def _(logits, begin, temperatures, temperature, softcap, weights, origins, sums, embedded):
    return None
