"""Forwards of targets over the engine's caches: our own for some families, and the model's modules for all others."""

from __future__ import annotations

from ...models import Target
from .families import has_lean_forward
from .lean import LeanForward
from .modules import ModuleForward

TargetForward = LeanForward | ModuleForward


def target_forward(target: Target, **options) -> TargetForward:
    """The forward that serves a target; the options are those of `LeanForward`."""
    return (LeanForward if has_lean_forward(target) else ModuleForward)(target, **options)


__all__ = ["LeanForward", "ModuleForward", "TargetForward", "target_forward"]
