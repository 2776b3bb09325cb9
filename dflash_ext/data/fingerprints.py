"""Hashes: whether answers are of this target and to these prompts, and the seeds of their random draws."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence

import torch


def of_prompts(prompts: Mapping[int, Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for index, ids in prompts.items():
        digest.update(array("q", [index, len(ids), *ids]).tobytes())
    return digest.hexdigest()[:16]


def of_weights(model: torch.nn.Module) -> str:
    """A hash of the first numbers of every tensor, in bf16, so that the dtype of loading does not matter."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        start = parameter.detach().flatten()[:16].to(torch.bfloat16)
        digest.update(start.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_of(*key: int | float | str) -> int:
    """A hash of `key` with 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def seed_of(*key: int | float) -> int:
    """A seed of 62 bits that follows from `key`."""
    return hash_of(*key) >> 2
