"""What a LoRA drafter is, beside its adapter: its kind, its blocks, and the base that it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..target import Target

KINDS = ("gated", "whole")


@dataclass(frozen=True)
class LoraDrafterConfig:
    """The settings of a LoRA drafter.

    Attributes:
        base: what the base is known by, as `identity_of` gives it.
        mask_token_id: the id that stands for a slot to draft. Its embedding is the drafter's own, and it is never
            drafted.
        kind: "gated": the adapter acts on mask rows alone, so that the base's cache serves both. "whole": it acts on
            every row while drafting, which needs a cache of its own.
        block_size: the slots of a block, the anchor included, so that one less are drafted.
        causal: whether a slot of a block sees only the slots up to itself.
        sampler_width: the inner dimension of the sampler head; None if there is none.

    Raises:
        ValueError: a setting is out of range.
    """

    base: dict[str, Any]
    mask_token_id: int
    kind: str = "gated"
    block_size: int = 8
    causal: bool = False
    sampler_width: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a LoRA drafter is '{self.kind}': {', '.join(KINDS)} are supported")
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}: at least 2 is needed, the anchor and a drafted slot")
        if self.sampler_width is not None and self.sampler_width < 1:
            raise ValueError(f"sampler_width is {self.sampler_width}: at least 1 is needed, or none for no head")
        if not 0 <= self.mask_token_id < self.base["vocab_size"]:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}: one of the base's {self.base['vocab_size']} tokens is needed"
            )

    @property
    def drafted(self) -> int:
        """The number of drafted slots in a block."""
        return self.block_size - 1

    def check_target(self, target: Target) -> None:
        """Raises a ValueError, which names the first difference, unless the drafter was made for this base."""
        check_identity(self.base, target, "LoRA drafter", "target")

    def check_one_forward(self) -> None:
        """Raises a ValueError unless one forward can verify a draft and make the next one."""
        if self.kind != "gated":
            raise ValueError(
                "a whole LoRA drafter acts on every row, so that no forward can verify beside drafting: a gated one is "
                "needed for a cycle of one forward"
            )
        if self.block_size < 3:
            raise ValueError(f"block size {self.block_size}: a cycle of one forward takes blocks of 3 slots or more")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> LoraDrafterConfig:
        """Reads what `save` has written; a ValueError says in one line what is wrong with the file."""
        try:
            settings = json.loads(path.read_text())
            known = {field.name for field in fields(cls)}
            if unknown := sorted(settings.keys() - known):
                raise ValueError(f"{', '.join(unknown)} is not known")
            return cls(**settings)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot read the LoRA drafter's config in '{path.parent}': {error}") from error


def identity_of(target: Target) -> dict[str, Any]:
    """What a base is known by: its class, its sizes and a hash of its weights."""
    return {
        "class": type(target.model).__name__,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "weights": target.fingerprint,
    }


def check_identity(base: Mapping[str, Any], target: Target, made: str, its: str) -> None:
    """Raises a ValueError, which names the first difference, unless `target` is the base that something was made for.

    Args:
        base: what that base is known by.
        made, its: what was made, and what `target` is to it, for the message.
    """
    for name, value in identity_of(target).items():
        if base.get(name) != value:
            raise ValueError(
                f"the {made} was made for another base: its {name} is {base.get(name)!r}, this {its}'s is {value!r}"
            )
