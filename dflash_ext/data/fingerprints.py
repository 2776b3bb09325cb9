"""Hashes: whether answers are to these prompts, and the seeds of their random draws."""

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


def hash_of(*key: int | float | str) -> int:
    """A hash of `key` with 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def seed_of(*key: int | float) -> int:
    """A seed of 62 bits that follows from `key`."""
    return hash_of(*key) >> 2


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose draws follow from `key`, such as ("anchors", seed, step, index).

    A run that resumes, more ranks or more workers draw the same numbers, because the key names what is drawn and not
    who draws it or when.
    """
    return torch.Generator().manual_seed(hash_of(*key) >> 1)
