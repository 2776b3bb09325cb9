"""The random numbers of the native operators (csrc/sample/random.h), in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import is_int, shown

# Each operator draws from a stream of its own, because a draft and its verification must be independent even if they
# have the same seed. So does the noise of a canvas.
SAMPLE, VERIFY, NOISE = 1, 2, 3


def seed_tensor(op: str, seed: int | Tensor | torch.Generator, shape: torch.Size, device: torch.device) -> Tensor:
    """The seed as int64 ``[1]``, or ``[N]`` if each of the rows of ``shape`` has a seed of its own."""
    if isinstance(seed, torch.Generator):
        return torch.empty(1, dtype=torch.int64, device=seed.device).random_(generator=seed).to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape not in ((), (1,), shape):
            raise ValueError(f"{op}: seed is {shown(seed)}; int64 [], [1] or {list(shape)} is needed")
        return seed.flatten().contiguous()
    if not is_int(seed):
        raise TypeError(f"{op}: seed is {shown(seed)}; an int, an int64 tensor or a torch.Generator is needed")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed is {shown(seed)}; an int of 64 bits is needed")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def uniforms_of(seed: Tensor, stream: int, rows: int, count: int) -> Tensor:
    """float64 ``[rows, count]`` in [0, 1), a function of the seed, the stream, the row and the column.

    They are SplitMix64's mixing function of counters, so nothing is read back and no state is kept. If each row has a
    seed, every row is the first one of its seed.
    """
    index = torch.arange(rows, device=seed.device) if seed.shape[0] == 1 else torch.zeros_like(seed)
    key = _mix(_mix(_mix(seed + _GOLDEN) + stream) + index * _GOLDEN)
    bits = _mix(key[:, None] + torch.arange(1, count + 1, device=seed.device) * _GOLDEN)
    return _shifted(bits, 11).double() * 2.0**-53


def uniform_tokens(seeds: Tensor, vocab_size: int) -> Tensor:
    """A random token for each seed, int64 of the seeds' shape: the noise of canvases and of blocks.

    The bits are mixed once and stay integers, so that a graph of a denoising step needs few kernels for them. This is
    random enough, because no probability is compared with these tokens.
    """
    bits = _mix((seeds + NOISE) * _GOLDEN)
    return (_shifted(bits, 24) * vocab_size) >> 40


def derived(seed: Tensor, counter: Tensor | int) -> Tensor:
    """Seeds that are independent of each other for every seed and counter; int64, of the shape to which they broadcast.

    Sums of a seed and a counter are not: seed 0 at counter 1 would be seed 1 at counter 0.
    """
    return _mix(_mix(seed + _GOLDEN) + counter)


def advanced(seed: Tensor, counter: Tensor) -> Tensor:
    """As `derived`, by one product and one sum, for seeds that `derived` has made.

    The seeds of different counters lie so far from each other (a Weyl sequence) that positions can be added to them.
    """
    return seed + counter * _GOLDEN


# 2^64 over the golden ratio and SplitMix64's two multipliers, as the signed numbers that torch.int64 holds.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, with zeros in the place of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
