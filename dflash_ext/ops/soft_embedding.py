"""Expected embeddings of a distribution over the vocabulary, for self-conditioning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_operands, check_tensors, shown
from ..native import load
from ..reference import Sample
from ..reference.numerics import softcapped
from .backends import warn_once
from .logits import LOGITS_DTYPES, by_row, cap_of, check_last_dim, number_and_tensor
from .random import seed_tensor
from .sampling import sample, unpacked

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
        logits: ``[..., V]`` float64, float32, bfloat16 or float16, the last dimension contiguous. A NaN is no token,
            with a softcap, too, and +inf counts as the largest number.
        embedding: ``[V, H]`` float64, float32, bfloat16 or float16. Exponentials are rounded to its dtype.
        temperature: a number > 0, or a tensor ``[]`` or ``[...]``. What is outside of 1e-30 to 1e30 counts as the
            nearest of these.
        softcap: ``softcap * tanh(logits / softcap)`` comes before the temperature; None or 0 for none.

    Returns:
        ``[..., H]`` of the embedding's dtype. A row of nothing but -inf and NaN is NaN.

    Raises ValueError for arguments that do not fit together, TypeError for one of another type.
    """
    shape = _check("soft_embedding", logits, embedding, temperature)
    temperature = by_row("soft_embedding", shape, temperature=temperature)["temperature"]
    softcap = cap_of("soft_embedding", softcap)
    logits, embedding = logits.detach().reshape(shape.numel(), logits.shape[-1]), embedding.detach()
    is_double = torch.float64 in (logits.dtype, embedding.dtype)
    if logits.is_cuda and not is_double:
        embedded = _on_gpu(logits, embedding, temperature, softcap)
    else:
        if logits.is_cuda:
            warn_once("soft_embedding", logits.device)
        embedded = _in_pytorch(logits, embedding, temperature, softcap)
    return embedded.to(embedding.dtype).view(*shape, embedding.shape[1])


def sample_and_embed(
    logits: Tensor,
    embedding: Tensor,
    seed: int | Tensor | torch.Generator,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[Sample, Tensor]:
    """A draw, and the expected embedding of the distribution that it is from: ``sample`` and ``soft_embedding``.

    On a GPU one kernel does for bfloat16 what reads the logits in both, if V is a multiple of 8 and all weights fit
    into one chunk.

    Args:
        logits, temperature, softcap: as in ``soft_embedding``.
        embedding: ``[V, H]``.
        seed: as in ``sample``.

    Returns:
        The Sample of ``logits [..., V]``, and ``[..., H]`` of the embedding's dtype.

    Raises ValueError and TypeError as the two do.
    """
    op = "sample_and_embed"
    shape = _check(op, logits, embedding, temperature)
    check_operands(op, logits=logits, seed=seed)
    of_rows = by_row(op, shape, temperature=temperature)["temperature"]
    cap, seed = cap_of(op, softcap), seed_tensor(op, seed, shape, logits.device)
    rows, vocab = shape.numel(), logits.shape[-1]
    is_one_read = logits.is_cuda and logits.dtype == embedding.dtype == torch.bfloat16 and vocab % 8 == 0
    if not is_one_read or rows == 0 or len(_chunks(rows, vocab)) > 1:
        options = {"temperature": temperature, "softcap": softcap}
        seed = seed if len(seed) == 1 else seed.view(shape)
        return sample(logits, seed, **options), soft_embedding(logits, embedding, **options)
    number, tensor = number_and_tensor(of_rows, 1.0, torch.float32)
    ids, reals, weights, sums = _native.weighted_draw(logits.detach().reshape(rows, vocab), seed, tensor, number, cap)
    embedded = _divided(torch.mm(weights, embedding.detach(), out_dtype=torch.float32), sums, embedding.dtype)
    drawn, _ = unpacked(ids, reals)
    return Sample(*(field.view(shape) for field in drawn)), embedded.view(*shape, embedding.shape[1])


def _check(op: str, logits: Tensor, embedding: Tensor, temperature: float | Tensor) -> torch.Size:
    """Raises ValueError for arguments that do not fit together, TypeError for one of another type; returns the shape of
    the rows."""
    check_tensors(op, logits=logits, embedding=embedding, numbers={"temperature": temperature})
    if logits.dim() == 0 or logits.dtype not in LOGITS_DTYPES or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits is {shown(logits)}; floating [..., V], V > 0, is needed")
    vocab = logits.shape[-1]
    if embedding.dim() != 2 or len(embedding) != vocab or embedding.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{op}: embedding is {shown(embedding)}; floating [{vocab}, H] is needed")
    check_last_dim(op, "logits", logits)
    if not isinstance(temperature, Tensor) and (temperature is None or not temperature > 0):
        raise ValueError(f"{op}: temperature is {temperature}; a number above 0 is needed")
    return logits.shape[:-1]


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
    return _divided(embedded, sums, embedding.dtype)


def _divided(embedded: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.div(embedded, sums[:, None], out=embedded.new_empty(embedded.shape, dtype=dtype))


def _in_pytorch(logits: Tensor, embedding: Tensor, temperature: float | Tensor, softcap: float) -> Tensor:
    """The same sums; two passes over the logits, the first of which finds the largest ones."""
    real = torch.promote_types(torch.promote_types(logits.dtype, embedding.dtype), torch.float32)
    chunks = _chunks(len(logits), logits.shape[1])
    if isinstance(temperature, Tensor):
        temperature = temperature.to(real)[:, None]
    temperature = torch.as_tensor(temperature, dtype=real, device=logits.device).clamp(1e-30, 1e30)
    largest = torch.finfo(real).max

    def scores(begin: int, end: int) -> Tensor:
        z = logits[:, begin:end].to(real)
        z = softcapped(z.clamp(max=largest), softcap)
        z = z.masked_fill(z.isnan(), -math.inf)
        return (z / temperature).clamp(max=largest)

    origin = torch.stack([scores(*chunk).amax(-1) for chunk in chunks]).amax(0)[:, None]
    embedded = logits.new_zeros(len(logits), embedding.shape[1], dtype=real)
    total = logits.new_zeros(len(logits), 1, dtype=real)  # no logarithm, which would round as large scores do
    for begin, end in chunks:
        weights = (scores(begin, end) - origin).exp()
        total += weights.sum(-1, keepdim=True)
        embedded += weights.to(embedding.dtype).to(real) @ embedding[begin:end].to(real)
    return embedded / total


@torch.library.register_fake("dflash_ext::scaled_exp_")
def _(logits, begin, temperatures, temperature, softcap, weights, origins, sums, embedded):
    return None


@torch.library.register_fake("dflash_ext::weighted_draw")
def _(logits, seed, temperatures, temperature, softcap):
    rows, real = logits.shape[0], torch.float32
    ids, weights = logits.new_empty(2, rows, dtype=torch.int64), logits.new_empty(logits.shape)
    return ids, logits.new_empty(8, rows, dtype=real), weights, logits.new_empty(rows, dtype=real)
